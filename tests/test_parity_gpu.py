"""ViT-L against transformers on a GPU (`pytest -m campaign`), and the same at a tiny size here."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import parity
import pytest
from says import says

ROOT = Path(__file__).parents[1]

needs_torch = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="torch and transformers are not installed",
)


@pytest.mark.campaign
@needs_torch
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no GPU")
def test_vit_large_on_a_gpu():
    """In a process of its own, because this one runs on fake CPU devices."""
    child = subprocess.run(
        [sys.executable, ROOT / "tests" / "parity_at_size.py"],
        env=os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(child.stdout)
    assert child.returncode == 0, child.stderr


@needs_torch
def test_the_comparison_at_a_tiny_size():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        import parity_at_size
    errors = parity_at_size.errors(parity.MODEL, (4, 4, 4), (9, 14), spread=0.15)
    assert parity_at_size.out_of_bounds(errors) == []
    for part in ("encoder", "predictor"):
        for kind in ("l2", "max"):
            assert errors["ours float32"][part][kind] < 1e-5
            for who in ("ours", "transformers"):
                assert 1e-3 < errors[f"{who} bfloat16"][part][kind] < 0.1
    worse = copy.deepcopy(errors)
    worse["ours float32"]["encoder"]["max"] = 2e-4
    worse["ours bfloat16"]["predictor"]["l2"] = float("nan")
    first, second = parity_at_size.out_of_bounds(worse)
    says(first, "ours float32", "encoder", "max", "2.00e-04", "1.00e-04")
    says(second, "ours bfloat16", "predictor", "l2", "nan")
