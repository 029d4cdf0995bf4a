"""A process ends when it says so: in bounded time, with its exit code, whatever is stuck."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import micro
import pytest
from says import holds, lines_with, says

from wmjax.run import exits

pytestmark = pytest.mark.processes  # a command each

TERM, INT = 128 + signal.SIGTERM, 128 + signal.SIGINT


def python(code, *argv, timeout=60, **how):
    """Run a program; it fails the test if it does not end in time."""
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        env=micro.environment(1),
        cwd=micro.ROOT,
        timeout=timeout,
        text=True,
        **({"capture_output": True} | how),
    )


HANGS = """
import atexit, threading, time
from wmjax import door
from wmjax.errors import UserError

def run(argv):
    threading.Thread(target=time.sleep, args=(3600,)).start()  # Python would wait for it
    atexit.register(time.sleep, 3600)
    atexit.register(print, "closed")
    if argv[0] == "UserError":
        raise UserError("mine")
    if argv[0] == "exit":
        raise SystemExit("text")
    return int(argv[0])

door.HANDLERS_S = 0.5
door.run_and_exit(run, "interrupted")
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("0", 0, ""), ("143", 143, ""), ("UserError", 2, "error: mine\n"), ("exit", 2, "text\n")],
)
def test_no_thread_and_no_exit_handler_keeps_a_command_from_its_end(how, code, said):
    done = python(HANGS, how, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (code, "closed\n", said)


STALE = """
import errno, os, pwd
from wmjax import main

def stale(path, *rest, **named):
    if "/2" in str(path) and "state" in str(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
    return mkdir(path, *rest, **named)

def nobody(uid):
    raise KeyError(uid)

mkdir, os.mkdir, pwd.getpwuid = os.mkdir, stale, nobody
main.cli()
"""


def test_a_run_whose_save_failed_ends_also_without_a_home_and_standard_error(tmp_path):
    """Threads of Orbax wait for 24 hours after one mkdir that failed."""
    _, _, _, *flags = micro.command(tmp_path, "checkpoint.every=2")
    environment = micro.environment(1)
    for name in ("HOME", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(name, None)
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", STALE, *flags],
        env=environment,
        cwd=micro.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert len(lines_with(done.stdout, "warning", tmp_path / "checkpoints/2")) == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4"}


# Output that nobody reads


@pytest.fixture
def pipe():
    reads, writes = os.pipe()
    yield reads, writes
    for end in (reads, writes):
        with contextlib.suppress(OSError):
            os.close(end)


def test_lines_without_a_reader_are_kept_in_order_and_nobody_waits(monkeypatch, capsys, pipe):
    monkeypatch.setattr(exits, "WRITE_S", 0.1)
    monkeypatch.setattr(exits, "KEPT", 2)
    reads, writes = pipe
    os.set_blocking(writes, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writes, bytes(4096))
    os.set_blocking(writes, True)
    output = exits.Output()
    begun = time.monotonic()
    for line in (b"1\n", b"2\n", b"3\n", b"4\n", b"5\n"):  # 2 and 3 are kept
        output.put(lambda line=line: os.write(writes, line))
    assert output.late
    assert time.monotonic() - begun < 2
    seen = b""
    while not seen.endswith(b"3\n"):
        seen += os.read(reads, 1 << 20)
    assert seen.lstrip(b"\0") == b"1\n2\n3\n"
    deadline = time.monotonic() + 10
    while not (said := capsys.readouterr().out) and time.monotonic() < deadline:
        time.sleep(0.01)
    says(said, "warning", 2, lines=1)
    assert not output.late


UNREAD = """
import contextlib, os, sys, threading, time
for number in (1, 2):
    os.set_blocking(number, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(number, bytes(4096))
    os.set_blocking(number, True)
from wmjax import door
from wmjax.run import exits

def run(argv):
    if argv[0] == "watchdog":
        from wmjax.run import watchdog
        threading.Thread(target=print, args=("x" * 10000,), kwargs={"file": sys.stderr}).start()
        watchdog.COMPILE_S = 0.0
        with watchdog.Watchdog(0.2):
            time.sleep(3600)
    if argv[0] == "second":
        threading.Thread(target=print, args=("x" * 10000,)).start()
        time.sleep(0.2)
        exits.exit_now(130, "interrupted")
    if argv[0] == "fault":
        raise ValueError
    exits.output.put(lambda: print("done", flush=True))
    return int(argv[0])

door.run_and_exit(run, "interrupted")
"""


@pytest.mark.parametrize(
    ("how", "code"), [("0", 0), ("143", 143), ("fault", 2), ("second", 130), ("watchdog", 75)]
)
def test_a_process_ends_whose_output_nobody_reads(how, code):
    """Both pipes are full from the start; in two cases another thread has the stream's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", UNREAD, how],
        env=micro.environment(1),
        cwd=micro.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process.stdout, process.stderr:
        try:
            assert process.wait(timeout=40) == code
        finally:
            process.kill()


# Signals from the first second on


def run_shim(tmp_path, number, *command):
    """Run the command line with a library that sends a signal while it is imported."""
    shim = tmp_path / "ml_collections"
    shim.mkdir()
    (shim / "__init__.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{number.name})\ntime.sleep(3)\n"
    )
    environment = micro.environment(1)
    environment["PYTHONPATH"] = f"{tmp_path}:{micro.ROOT}"
    return subprocess.run(
        [*micro.AS_IN_A_TERMINAL, *command, sys.executable, "-m", "wmjax.main", "--list"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_one_line(tmp_path, number):
    done = run_shim(tmp_path, number)
    assert done.returncode == 128 + number
    says(done.stderr, number.name, lines=1)


NEW = ("unshare", "--user", "--map-root-user", "--pid", "--fork")


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NEW, "true"], capture_output=True).returncode,
    reason="needs unshare",
)
def test_process_1_of_a_container_hears_sigterm_at_once(tmp_path):
    """The kernel drops a signal to process 1 that has no handler."""
    done = run_shim(tmp_path, signal.SIGTERM, *NEW)
    assert done.returncode == TERM
    says(done.stderr, "SIGTERM", lines=1)


IN_C = """
import ctypes
from wmjax import door

def run(argv):
    lock = ctypes.create_string_buffer(128)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    print("ready", flush=True)
    libc.pthread_mutex_lock(lock)  # for ever

door.run_and_exit(run, "nothing was saved")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_heard_while_the_main_thread_is_in_c(number):
    process = subprocess.Popen(
        [*micro.AS_IN_A_TERMINAL, sys.executable, "-c", IN_C],
        env=micro.environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.5)  # for the call
            process.send_signal(number)
            assert process.wait(timeout=20) == 128 + number
        finally:
            process.kill()
        says(process.stderr.read(), number.name, lines=1)


FORKS = """
import os, signal, sys, time
from wmjax import door

def run(argv):
    child = os.fork()
    if not child:
        time.sleep(60)
    ended = 0
    while not ended:  # Python forgets a signal that comes at once after the fork
        os.kill(child, signal.SIGTERM)
        time.sleep(0.1)
        ended, status = os.waitpid(child, os.WNOHANG)
    return 3 if os.WTERMSIG(status) == signal.SIGTERM else 4

door.run_and_exit(run, "interrupted")
"""


def test_a_signal_to_a_forked_child_is_its_own():
    done = python(FORKS)
    assert (done.returncode, done.stderr) == (3, "")


# What the environment may lack


@pytest.mark.parametrize("name", ["main", "viz", "data", "weights", "bench"])
def test_every_door_keeps_its_code_with_closed_streams(name):
    for closed, flag, code in ((">&-", "--help", 0), ("<&- >&- 2>&-", "--nonsense", 2)):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", f"wmjax.{name}", flag],
            env=micro.environment(1),
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--xla_nonsense=1", ["--xla_nonsense=1"]),
        ("--xla_dump_max_hlo_modules=abc", ["abc", "xla_dump_max_hlo_modules"]),
    ],
)
@pytest.mark.parametrize("door", ["main", "bench step"])
def test_flags_that_xla_aborts_for_are_named(tmp_path, flags, named, door):
    done = subprocess.run(
        [
            *(sys.executable, "-m", *f"wmjax.{door}".split(), "--config=debug_world_model"),
            *([f"--workdir={tmp_path}"] if door == "main" else []),
        ],
        env=micro.environment(1) | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    says(done.stderr, f"XLA_FLAGS={flags!r}", *named, lines=1)
    assert not holds(done.stdout, "Traceback")


NOBODY = """
import os, pwd, runpy, sys
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("wmjax.data", "check", "~/d"), "~/d"),
        (("wmjax.weights", "show", b"run\xff"), "run\\udcff"),
        (("wmjax.data", "stats", b"run\xff"), "run\\udcff"),
    ],
)
def test_a_user_without_a_home_and_names_that_are_not_utf8_are_one_line(tmp_path, argv, named):
    (tmp_path / "run\udcff" / "checkpoints" / "1").mkdir(parents=True)
    environment = micro.environment(1)
    environment.pop("HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, *argv],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    says(done.stderr, named, lines=1)
