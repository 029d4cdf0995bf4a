"""Where the tests find datasets: a small one beside them, larger ones beside the checkout."""

from pathlib import Path

import pytest

PUSHT = Path(__file__).parent / "data" / "pusht_sim_v3"
SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no datasets in {SHARED}")
