"""What the doors share: flags of the configuration, compiled programs, heaps, exit codes."""

import argparse
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import ml_collections

from wmjax import config as configs
from wmjax.errors import UserError, suggest

_PREFIX = "--config."
_M_ARENA_MAX = -8  # of malloc.h


_KEYS = """\
any key of the configuration:
  --config.KEY=VALUE, as in --config.optim.learning_rate=3e-4
  (configs/base.py explains every key)
"""


class Parser(argparse.ArgumentParser):
    """One whose mistakes are a user's like any other: a line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.prog} --help says more")


def parser(prog: str, description: str, more: str = "") -> Parser:
    """Return a parser whose help tells how keys of the configuration are written, and `more`."""
    return Parser(
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
            parser.error(f"{word}: unknown{_meant(parser, word)}")
        if "=" not in word and rest and not rest[0].startswith("--"):
            word += "=" + rest.pop(0)
        overrides.append(word.removeprefix(_PREFIX))
    return flags, overrides


def known_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long flags of a parser, read from its usage line."""
    return ["--help", *re.findall(r"--[a-z][\w-]*", parser.format_usage())]


def _meant(parser: argparse.ArgumentParser, word: str) -> str:
    """Suggest the nearest flag, or say how keys of the configuration are written."""
    flag = word.partition("=")[0]
    if flag in configs.list_configs():
        return f" (did you mean --config={flag}?)"
    if flag.startswith("--") and flag[2:].partition(".")[0] in configs.get_config("base"):
        return f" (did you mean {_PREFIX}{word.removeprefix('--')}?)"
    nearest = suggest(flag, known_flags(parser))
    return nearest or "; keys of the configuration are written --config.KEY=VALUE"


def load(
    parser: argparse.ArgumentParser, flags: argparse.Namespace, overrides: list[str]
) -> ml_collections.ConfigDict:
    """Return the configuration that the flags name; must come before the first use of a device."""
    if not flags.config:
        parser.error(f"--config=NAME is needed; shipped: {', '.join(configs.list_configs())}")
    config = configs.load(flags.config, overrides)
    if config.train.deterministic:
        make_deterministic()
    return config


def make_deterministic() -> None:
    """Ask XLA for bit-equal results on GPUs: it reads the flag when the first device starts."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"


def keep_compiled() -> None:
    """Keep compiled programs from run to run; imports jax."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "wmjax")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def share_heaps() -> None:
    """Let four cores share one heap of glibc's; must come before threads are started.

    It gives eight to each core. Each keeps what it once needed, so that a run grows for thousands
    of steps, and gives pages back and forth: threads that read small clips took twice the time.
    """
    if "MALLOC_ARENA_MAX" in os.environ:  # which glibc has followed already
        return
    with contextlib.suppress(AttributeError):  # another C library
        heaps = max(1, len(os.sched_getaffinity(0)) // 4)
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, heaps)


def run_and_exit(run: Callable[[list[str]], int], interrupted: str) -> NoReturn:
    """Run the command line; a user's mistake is its few lines and exit code 2."""
    share_heaps()
    sys.unraisablehook = _interrupt_again
    code = _run(run, interrupted)
    try:
        if sys.stdout:  # None where it is closed
            sys.stdout.flush()
    except OSError as error:
        # Nor shall the interpreter, as it ends, complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
            code = code or 2
    sys.exit(code)


def _run(run: Callable[[list[str]], int], interrupted: str) -> int | str | None:
    try:
        return run(sys.argv[1:])
    except SystemExit as done:  # as of --help
        return done.code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # whoever reads has seen enough, as in `| head`
            return 128 + signal.SIGPIPE
        raise


def _interrupt_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that was lost in a callback of the garbage collector, as jax has one."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        with contextlib.suppress(RuntimeError):  # the interpreter is ending anyway
            threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)
