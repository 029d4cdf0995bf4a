"""What all commands share: configuration flags, compilation cache, malloc arenas, exit codes.

Importing this room does not import jax.
"""

import argparse
import contextlib
import ctypes
import io
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NoReturn

import ml_collections

from wmjax import __version__
from wmjax import config as configs
from wmjax.errors import ExitCode, UserError, reason, suggest
from wmjax.run import exits

_PREFIX = "--config."
_M_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_EMITTERS = "xla_cpu_use_fusion_emitters"  # a flag of XLA
_READ_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"
READ_S = 600.0  # for a reader of the last lines, such as a pager
HANDLERS_S = 10.0  # for exit handlers
OTHERS_S = 330.0  # the same with other processes: jax waits 300 s for them

_KEYS = """\
keys of the configuration:
  --config.KEY=VALUE sets a key, as in --config.optim.learning_rate=3e-4
  --config.KEY=      empties a key that may be empty
  (configs/base.py explains every key)
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --version that raises UserError: a line, not a page of usage."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--version", action="version", version=f"wmjax {__version__}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\nsee {self.prog} --help")


def parser(prog: str, description: str, more: str = "") -> Parser:
    """Return a parser whose help ends with the syntax of configuration keys and with `more`."""
    return Parser(
        prog=prog,
        description=description,
        epilog=f"{_KEYS}\n{more}" if more else _KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="a shipped configuration (--list of wmjax.main names them), a .py file, or the "
        "folder or the config.json of a run",
    )
    parser.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="allow a config.json to name a model or a source of this package, which runs its code",
    )


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


def parse_command(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    argv: list[str],
) -> argparse.Namespace:
    """Parse the command line of a door without a configuration; commands: its subparsers."""
    flags, rest = parser.parse_known_args(argv)
    if rest:
        own = commands[flags.command]
        own.error(f"{rest[0]}: unknown{_nearest_flag(own, rest[0].partition('=')[0])}")
    return flags


def _nearest_flag(parser: argparse.ArgumentParser, flag: str) -> str:
    """Suggest a long flag; compared without the dashes, which all share."""
    names = [known.removeprefix("--") for known in known_flags(parser)]
    return suggest(flag.lstrip("-"), names, "--")


def known_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Return the long flags of a parser, read from its usage line."""
    return ["--help", *re.findall(r"--[a-z][\w-]*", parser.format_usage())]


def _meant(parser: argparse.ArgumentParser, word: str) -> str:
    """Suggest the nearest flag or key; without one, explain the syntax of configuration keys."""
    flag = word.partition("=")[0]
    if flag in configs.list_configs():
        return f" (did you mean --config={flag}?)"
    if flag.startswith("--"):
        if flag[2:].partition(".")[0] in configs.get_config("base"):
            return f" (did you mean {_PREFIX}{word.removeprefix('--')}?)"
        if keys := configs.keys_named(flag[2:])[:3]:
            return f" (did you mean {' or '.join(_PREFIX + key for key in keys)}?)"
    nearest = _nearest_flag(parser, flag)
    return nearest or "; write keys of the configuration as --config.KEY=VALUE"


def load(
    parser: argparse.ArgumentParser, flags: argparse.Namespace, overrides: list[str]
) -> ml_collections.ConfigDict:
    """Load the configuration that --config names; call it before any use of a device."""
    if not flags.config:
        parser.error(f"needs --config=NAME; shipped: {', '.join(configs.list_configs())}")
    flags.config = configs.full_name(flags.config)
    config = configs.load(flags.config, overrides, flags.trust)
    flags.changed = [f"{_PREFIX}{each}" for each in overrides]
    if config.train.deterministic:
        make_deterministic()
    return config


def make_deterministic() -> None:
    """Make results on GPUs bit-equal.

    Call it before the first use of a device: XLA reads the flag then.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"


def check_xla_flags() -> None:
    """Raise UserError for XLA_FLAGS that XLA cannot read; call it before any use of a device.

    XLA would abort the process at the first compilation, so another process reads them first.
    """
    flags = os.environ.get("XLA_FLAGS")
    if not flags:
        return
    done = subprocess.run(
        [sys.executable, "-c", _READ_FLAGS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
    )
    # XLA logs as "E1129 13:24:07.590772   26628 file.cc:63] text", and F for what is fatal.
    said = re.findall(r"^([EF])\d{4} [^\]]*\] (.*)", done.stderr, re.MULTILINE)
    if done.returncode and any(level == "F" for level, _ in said):
        raise UserError(f"XLA_FLAGS={flags!r}: {said[0][1]}: wanted flags of this release, or none")


def compile_fast() -> None:
    """Make jaxlib 0.10 compile faster for CPUs; steps take longer there, and round differently.

    Of vjepa2_aloha, tiny and scanned: 14 s of CPU time in place of 21, and 3.0 s a step in place of
    2.4. XLA_FLAGS="--xla_cpu_use_fusion_emitters=true" undoes it: a user's value stays. Call it
    before the first use of a device: XLA reads the flag then. Later releases lack the flag.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if metadata.version("jaxlib").startswith("0.10.") and _EMITTERS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_EMITTERS}=false"


def keep_compiled() -> None:
    """Turn on jax's persistent compilation cache and fast compilation; imports jax.

    Checks XLA_FLAGS.

    Folder: $JAX_COMPILATION_CACHE_DIR, or ~/.cache/wmjax; a user without a home has none.
    Compilations under 0.5 s are not kept.
    """
    check_xla_flags()
    compile_fast()
    import jax

    home = os.path.expanduser("~/.cache/wmjax")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", home)
    if cache.startswith("~"):
        return
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def share_heaps() -> None:
    """Limit glibc's malloc to one arena per four cores; call it before any thread starts.

    The default is eight arenas per core. Each arena keeps the memory that it once needed, so the
    memory of a run grows for thousands of steps. Arenas also return pages to the system and request
    them again; with that, threads that read small clips took twice the time.
    """
    if "MALLOC_ARENA_MAX" in os.environ:  # glibc has read it already
        return
    with contextlib.suppress(AttributeError):  # not glibc
        heaps = max(1, len(os.sched_getaffinity(0)) // 4)
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, heaps)


def run_and_exit(run: Callable[[list[str]], int], interrupted: str) -> NoReturn:
    """Run a command with the process's arguments and exit with its code, in bounded time.

    A UserError is printed and exits with code 2. interrupted: printed after a Ctrl-C. Threads are
    not waited for: after an error, those of a library may wait for hours.
    """
    share_heaps()
    _open_streams()
    os.environ["PYTHONSAFEPATH"] = "1"  # child processes run no code of the current folder
    sys.unraisablehook = _interrupt_again
    exits.catch_signals(interrupted, ctrl_c=False)
    exits.catch_in_thread()
    try:
        code = _code_of(_run(run, interrupted))
    except Exception:  # a fault of ours, or of the user's own model or evaluator
        exits.write_error(traceback.format_exc().rstrip())
        code = ExitCode.MEND
    code = _flush(code)
    exits.leave(code, _patience(code))


def _code_of(returned: int | str | None) -> int:
    """Return the code of what a command returned, or sys.exit was given: a text is an error."""
    if isinstance(returned, str):
        exits.write_error(returned)
        return ExitCode.MEND
    return returned or ExitCode.DONE


def _open_streams() -> None:
    """Make standard streams that are closed go nowhere, and let each print any text.

    Else the next files that are opened get the numbers of closed streams, and libraries print into
    them. Names of files may hold bytes that are not UTF-8.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush(code: int) -> int:
    """Write what is left of standard output; return the code, or 2 if that fails."""
    failed: list[OSError] = []

    def flush() -> None:
        try:
            sys.stdout.flush()
        except OSError as error:
            failed.append(error)

    exits.in_time(flush, exits.WRITE_S if exits.output.late else READ_S)
    # The reader may have seen enough. After an error, something is said already.
    if failed and not isinstance(failed[0], BrokenPipeError) and code != ExitCode.MEND:
        exits.write_error(f"error: standard output: {failed[0].strerror}")
        return code or ExitCode.MEND
    return code


def _patience(code: int) -> float:
    """Return the seconds that exit handlers get.

    At the orderly end of several processes, jax waits for all of them. After an error, the others
    may wait for this one.
    """
    jax = sys.modules.get("jax")
    orderly = code == ExitCode.DONE or code > ExitCode.SIGNAL
    with contextlib.suppress(AttributeError):  # jax is imported in part
        if jax and orderly and jax.distributed.is_initialized():
            return OTHERS_S
    return HANDLERS_S


def _run(run: Callable[[list[str]], int], interrupted: str) -> int | str | None:
    try:
        return run(sys.argv[1:])
    except SystemExit as done:  # raised by --help, for example
        return done.code
    except UserError as error:
        exits.write_error(f"error: {error}")
        return ExitCode.MEND
    except KeyboardInterrupt:
        exits.write_error(interrupted)
        return ExitCode.SIGNAL + signal.SIGINT
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
            return ExitCode.SIGNAL + signal.SIGPIPE
        raise
    except OSError as error:
        if _can_print():
            raise
        exits.write_error(f"error: standard output: {error.strerror}")
        return ExitCode.MEND
    except (RuntimeError, AssertionError, MemoryError) as error:
        if not (fault := _no_platform() or _no_memory(error)):
            raise
        exits.write_error(f"error: {fault}")
        return ExitCode.MEND


def _can_print() -> bool:
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _no_platform() -> str:
    """Return why jax has no device of JAX_PLATFORMS; '' if it has, or none is asked for."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked and "jax" in sys.modules:
        try:
            sys.modules["jax"].devices()
        except (RuntimeError, AssertionError) as error:
            why = f" ({reason(error)})" if str(error) else ""
            return (
                f"JAX_PLATFORMS={asked!r}: this jax has no such device here{why}\n"
                "wanted its driver and the extra of it (cuda, tpu), or JAX_PLATFORMS=cpu"
            )
    return ""


def _no_memory(error: Exception) -> str:
    """Return two lines for an error of memory that ran out; '' for any other."""
    if "jax" not in sys.modules:
        return f"out of memory on the host: {reason(error)}" * isinstance(error, MemoryError)
    from wmjax.run.memory import out_of_memory

    return out_of_memory(error)


def _interrupt_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Raise a Ctrl-C again that Python dropped in a garbage-collector callback; jax has one."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        main = threading.main_thread().ident
        with contextlib.suppress(RuntimeError):  # the interpreter is ending
            threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(dropped)
