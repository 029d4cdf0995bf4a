"""wmjax: train video world models on robot video, in pure JAX and Flax NNX.

Public names: load, get_config, list_configs. Each is imported at its first use, so `import wmjax`
is fast.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - a checkout may meet any Python
    raise ImportError("wmjax needs Python 3.11 or newer; this is " + sys.version.split()[0])

# `python -m wmjax...` puts the current folder first, where a dataset's av.py or queue.py would run
# in place of the library. It goes last: own sources and models are still found there.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))

import importlib
import importlib.util
import re
from typing import Any

# A command hears signals from here on, while its imports still run. sys.argv[0] is "-m" until
# Python has found the module, in any program that imports wmjax.
_module = sys.orig_argv[-len(sys.argv) :][:1] if sys.argv[:1] == ["-m"] else sys.argv[:1]
if _module and re.fullmatch(r"(-m)?wmjax(\..*)?|.*/wmjax", _module[0]):
    for _name in ("jax", "flax", "ml_collections", "numpy"):
        if importlib.util.find_spec(_name) is None:
            sys.stderr.write(
                f"error: {_name} is not installed for {sys.executable}\n"
                "in the folder of wmjax: pip install -e . or uv run python -m wmjax.main ...\n"
            )
            raise SystemExit(2)
    from wmjax.run import exits

    exits.catch_signals("interrupted", ctrl_c=True)

__version__ = "0.1.0"

_HOME = {
    "get_config": "wmjax.config",
    "list_configs": "wmjax.config",
    "load": "wmjax.inference",
}

__all__ = ["__version__", *_HOME]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'wmjax' has no attribute '{name}'")
