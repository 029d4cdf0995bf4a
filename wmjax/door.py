"""What the doors share: flags of the configuration, compiled programs, one heap, exit codes."""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import ml_collections

from wmjax import config as configs
from wmjax.errors import UserError

_PREFIX = "--config."
_M_ARENA_MAX = -8  # of malloc.h


_KEYS = """\
any key of the configuration:
  --config.KEY=VALUE, as in --config.optim.learning_rate=3e-4
  (configs/base.py explains every key)
"""


def parser(prog: str, description: str, more: str = "") -> argparse.ArgumentParser:
    """Return a parser whose help tells how keys of the configuration are written, and `more`."""
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"{_KEYS}\n{more}" if more else _KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="NAME", help="a shipped configuration, or a .py file")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into flags and KEY=VALUE overrides of the configuration."""
    flags, rest = parser.parse_known_args(argv)
    overrides = []
    while rest:
        word = rest.pop(0)
        if not word.startswith(_PREFIX):
            parser.error(
                f"{word}: unknown; keys of the configuration are written --config.KEY=VALUE"
            )
        if "=" not in word and rest and not rest[0].startswith("--"):
            word += "=" + rest.pop(0)
        overrides.append(word.removeprefix(_PREFIX))
    return flags, overrides


def load(
    parser: argparse.ArgumentParser, flags: argparse.Namespace, overrides: list[str]
) -> ml_collections.ConfigDict:
    """Return the configuration that the flags name."""
    if not flags.config:
        parser.error(f"--config=NAME is needed; shipped: {', '.join(configs.list_configs())}")
    return configs.load(flags.config, overrides)


def keep_compiled() -> None:
    """Keep compiled programs from run to run; imports jax."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "wmjax")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def share_heap() -> None:
    """Let all threads share glibc's one heap; must come before they are started.

    With heaps of their own each keeps what it once needed, so that a run grows for thousands of
    steps, and those give pages back and forth: threads that read small clips took twice the time.
    """
    heaps = int(os.environ.get("MALLOC_ARENA_MAX", "1"))
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, heaps)


def leave(run: Callable[[list[str]], int], interrupted: str) -> NoReturn:
    """Run the command line; a user's mistake is its few lines and exit code 2."""
    share_heap()
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
