"""Runs of two processes end together: with the same code, whatever one of them is blocked in."""

import sys
import time

import cluster
import micro
import numpy as np
import pytest
from says import lines_with, says

from wmjax.errors import ExitCode
from wmjax.run.peers import READ_S
from wmjax.run.saved import Saved

pytestmark = [pytest.mark.processes, pytest.mark.timeout(280)]

SECONDS = 10  # a survivor ends within so many

# A process that does nothing but be blocked, as its argument says.
BLOCKED = """
import sys, time
import jax
from jax.experimental import multihost_utils
from wmjax import door
from wmjax.run import cluster, coordination

def block(arguments):
    where, coordinator, process = arguments
    cluster.start(coordinator, 2, int(process))
    print("joined", flush=True)
    if where == "python":  # other threads seldom run, so jax's abort would come first
        sys.setswitchinterval(0.7)
        while True:
            pass
    if process == "1":
        time.sleep(600)
    if where == "barrier":
        coordination.meet("never", 600)
    multihost_utils.sync_global_devices("never")

door.run_and_exit(cluster.ending_together(block), "")
"""


def start(tmp_path, commands):
    """Start two processes; folder dump/I gets the options of process I's compiled train step."""
    environments = [
        micro.environment(1)
        | {
            # A program from the cache would not be compiled, and dumped, again.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XLA_FLAGS": f"{cluster.FAST['XLA_FLAGS']} --xla_dump_to={tmp_path}/dump/{i} "
            "--xla_dump_hlo_module_re=.*train_step.*",
        }
        for i in (0, 1)
    ]
    return cluster.group(commands, environments, tmp_path)


def blocked(where):
    coordinator = f"localhost:{cluster.free_port()}"
    return [[sys.executable, "-c", BLOCKED, where, coordinator, str(i)] for i in (0, 1)]


def wait_for(what, processes):
    deadline = time.monotonic() + 200
    while not what():
        assert [process.poll() for process in processes] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def said(tmp_path, process, kind="err"):
    return (tmp_path / f"{process}.{kind}").read_text()


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("where", ["python", "barrier", "collective"])
def test_the_survivor_of_a_killed_process_ends_with_76(tmp_path, where, killed):
    with start(tmp_path, blocked(where)) as processes:
        wait_for(lambda: all("joined" in said(tmp_path, i, "out") for i in (0, 1)), processes)
        time.sleep(1)  # until they are blocked
        processes[killed].kill()
        begun = time.monotonic()
        code = processes[1 - killed].wait(60)
        seconds = time.monotonic() - begun
    text = said(tmp_path, 1 - killed)
    assert code == ExitCode.PEER_DIED, text
    assert seconds < SECONDS
    assert len(lines_with(text, f"process {killed} of 2")) == 1, text  # jax's log may follow


def test_process_0_ends_with_76_when_another_never_comes(tmp_path):
    command, _ = blocked("barrier")
    command[2] = f"from wmjax.run import cluster; cluster.IMAGES_S = 2{BLOCKED}"
    with cluster.group([command], [micro.environment(1)], tmp_path) as (process,):
        assert process.wait(60) == ExitCode.PEER_DIED
    says(said(tmp_path, 0), command[4], 2, lines=1)


# main with one part changed by the code in the first argument.
CHANGED = "import sys; from wmjax import main; exec(sys.argv.pop(1)); main.cli()"
SMALL = ("data.workers=0", "train.num_steps=4", "checkpoint.every=2", "model.depth=1")


def trained(tmp_path, *overrides, own=((), ()), code=("", "")):
    """Return the commands of two processes; own, code: of one process only."""
    flags = (f"--coordinator=localhost:{cluster.free_port()}", "--processes=2")
    return [
        [
            *(sys.executable, "-c", CHANGED, code[i]),
            *micro.command(tmp_path / "run", *SMALL, *overrides)[3:],
            *(*flags, f"--process={i}", *own[i]),
        ]
        for i in (0, 1)
    ]


def ended(tmp_path, commands, timeout=200):
    """Run two processes to their ends; return their codes, and the error that each printed."""
    with start(tmp_path, commands) as processes:
        codes = cluster.wait(processes, timeout)
    return codes, [(said(tmp_path, i)).rpartition("error: ")[2].strip() for i in (0, 1)]


SOURCE = "from wmjax.run import agree; agree.source_hash = lambda: 'other'"
LIBRARY = (
    "from wmjax.run import agree; v = agree.versions;"
    "agree.versions = lambda: v() | {'jaxlib': '0.0.7'}"
)
DATA = (
    "from wmjax.data.synthetic import SyntheticSource as S;"
    "S.fingerprint = lambda self: {'hash': 'theirs' if sys.argv[-1] == '--process=0' else 'ours'}"
)


@pytest.mark.parametrize(
    ("own", "code", "told"),
    [
        (["--config.optim.clip_norm=0.5"], "", ["optim.clip_norm", "0.5", "process 0"]),
        ([], SOURCE, ["other", "process 0"]),
        ([], LIBRARY, ["jaxlib", "0.0.7", "process 0"]),
        ([], DATA, ["data", "hash", "ours", "process 0"]),
        (["--workdir={}/other"], "", ["--workdir", "{}/other", "process 0"]),
        (["--config.optim.clip_nom=1"], "", ["optim.clip_nom"]),  # before it joins the other
        ([], "from wmjax import step; import wmjax.assemble as a; a.build = 0", ["TypeError"]),
    ],
)
def test_a_process_that_differs_or_fails_ends_both_with_2_and_one_line(tmp_path, own, code, told):
    own = [text.format(tmp_path) for text in own]
    codes, lines = ended(tmp_path, trained(tmp_path, own=((), own), code=("", code)))
    assert codes == [ExitCode.MEND] * 2, lines
    assert lines[0] == lines[1]
    says(lines[0], "process 1", *(text.format(tmp_path) for text in told))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# The fourth batch cannot be read.
UNREADABLE = (
    "from wmjax.errors import UserError; from wmjax.data.synthetic import SyntheticSource as S;"
    "g = S.__getitem__; c = iter(range(12));"
    "S.__getitem__ = lambda self, i: g(self, i) if next(c, None) is not None else bad(i)\n"
    "def bad(i): raise UserError(f'data.root: clip {i} of process 1')\n"
    "import time; from wmjax.run import peers; f = peers.fail\n"
    "peers.fail = lambda error: (print('failed at', time.time(), file=sys.stderr), f(error))"
)


def test_an_error_in_the_loop_of_one_process_ends_both_with_2_and_one_line(tmp_path):
    codes, lines = ended(tmp_path, trained(tmp_path, code=("", UNREADABLE)))
    assert codes == [ExitCode.MEND] * 2, lines
    (failed,) = lines_with(said(tmp_path, 1), "failed at")
    assert time.time() - float(failed.split()[-1]) < READ_S
    assert lines[0] == lines[1]
    says(lines[0], "process 1", "data.root", lines=1)
    assert 1 <= len(rows(tmp_path)) < 4


def rows(tmp_path):
    """Return what metrics.jsonl says of each step, without times."""
    return {row["step"]: row["loss"] for row in micro.rows(tmp_path / "run") if "loss" in row}


def weights(tmp_path):
    saved = Saved(tmp_path / "run" / "checkpoints")
    return saved.step, saved.read(saved.shapes)


# What a process hangs in, and so the other: in a collective of the fourth step, or in the save.
HANGS = {
    0: (
        "import time; from wmjax import train; b = train.Batches; n = b.__next__;"
        "c = iter(range(9)); w = lambda: time.sleep(600 if next(c) == 3 else 0);"
        "b.__next__ = lambda self: (w(), n(self))[1]"
    ),
    1: (
        "import time; from wmjax.run.checkpoint import Checkpoints as C; s = C.save;"
        "C.save = lambda self, step, *rest: time.sleep(600) if step == 4 else s(self, step, *rest)"
    ),
}


EXACT = "train.deterministic=True"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    codes, lines = ended(folder, trained(folder, EXACT))
    assert codes == [0, 0], lines
    return folder


def test_determinism_is_asked_for_in_both_processes(whole):
    for i in (0, 1):
        options = next((whole / "dump" / str(i)).glob("*train_step*debug_options")).read_text()
        assert "xla_gpu_deterministic_ops: true" in options


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(tmp_path, whole, killed):
    hangs = [HANGS[i] if i == killed else "" for i in (0, 1)]
    with start(tmp_path, trained(tmp_path, EXACT, code=hangs)) as processes:
        wait_for((tmp_path / "run/checkpoints/2/manifest.json").exists, processes)
        time.sleep(3)
        processes[killed].kill()
        begun = time.monotonic()
        code = processes[1 - killed].wait(60)
        assert code == ExitCode.PEER_DIED, said(tmp_path, 1 - killed)
        assert time.monotonic() - begun < SECONDS
    codes, lines = ended(tmp_path, trained(tmp_path, EXACT))
    assert codes == [0, 0], lines
    assert lines_with(said(tmp_path, 0, "out"), 2, tmp_path / "run")
    assert rows(tmp_path) == rows(whole)
    (step, found), (_, wanted) = weights(tmp_path), weights(whole)
    assert step == 4
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
