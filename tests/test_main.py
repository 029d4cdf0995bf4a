"""The door: every mistake a user can make is a few lines and exit code 2, never a traceback."""

import errno
import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import cluster
import micro
import pytest
from says import holds, lines_with, refused, says, suggests

import wmjax
from wmjax import config as configs
from wmjax import main
from wmjax.run import console, manifest

DOORS = ("wmjax.viz", "wmjax.data", "wmjax.weights", "wmjax.evals", "wmjax.bench")
PUSHT = micro.ROOT / "tests" / "data" / "pusht_sim_v3"


@pytest.fixture
def dataset(tmp_path):
    """A writable copy of the smallest real recording."""
    return shutil.copytree(PUSHT, tmp_path / "dataset")


def answer(*flags):
    """Return what the door says to a mistake."""
    with refused() as error:
        main.run(list(flags))
    return str(error.value)


def lerobot(root, workdir, *overrides):
    base = ["data.source=lerobot", f"data.root={root}", "data.frames=4", "data.image_size=32"]
    return [
        "--config=debug_world_model",
        f"--workdir={workdir}",
        *(f"--config.{override}" for override in (*micro.OVERRIDES, *base, *overrides)),
    ]


def test_a_mistake_ends_the_process_with_its_line_and_no_traceback(tmp_path):
    done = micro.run(tmp_path, "optim.learing_rate=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    says(done.stderr, "--config.optim.learing_rate", "optim.learning_rate", lines=3)
    assert "Traceback" not in done.stderr


@pytest.mark.processes
def test_a_configuration_of_the_current_folder_is_said_with_its_full_path(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "debug_world_model.py"
    own.parent.mkdir()
    own.write_text("def get_config():\n    raise RuntimeError('mine')")
    says(answer("--config=configs/debug_world_model.py"), f"--config={own}", "mine")
    shutil.copy(micro.ROOT / "configs" / "debug_world_model.py", own)
    overrides = [f"--config.{each}" for each in (*micro.OVERRIDES, "train.num_steps=1")]
    main.run(["--config=configs/debug_world_model.py", "--workdir=run", *overrides])
    says(capsys.readouterr().out, own)


def test_what_a_run_says_holds_no_control_characters(capsys):
    console.say("camera \x1b[2K\rstep 100/100 \x9b\u202e\udcff\nnext line")
    said = capsys.readouterr().out
    assert said == "camera \\x1b[2K\\rstep 100/100 \\x9b\\u202e\\udcff\nnext line\n"


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/hostname", "default/../../outside", "link", "a\0"]
)
def test_a_manifest_names_nothing_outside_its_checkpoint(tmp_path, name):
    (tmp_path / "outside").write_text("secret")
    folder = tmp_path / "4"
    (folder / "default").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / manifest.NAME).write_text(json.dumps({name: [6, "0"]}))
    fault = manifest.fault(folder)
    assert holds(fault, manifest.NAME, repr(name))
    assert "6" not in fault


THREADS = """
import ctypes, threading
from wmjax import door
def run(argv):
    together = threading.Barrier(4)
    def hold():
        held = bytearray(4000)
        together.wait()
    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ctypes.CDLL(None).malloc_stats()
    return 0
door.run_and_exit(run, "interrupted")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")
@pytest.mark.parametrize("asked", [{}, {"MALLOC_ARENA_MAX": "3"}])
def test_four_cores_share_a_heap_unless_others_are_asked_for(asked):
    heaps = min(5, max(1, len(os.sched_getaffinity(0)) // 4))  # five threads, the first one too
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env={name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
        | asked,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^Arena ", done.stderr, re.MULTILINE)) == (3 if asked else heaps)


def test_list_and_help_answer(capsys):
    assert main.run(["--list"]) == 0
    said = capsys.readouterr().out
    for name in configs.list_configs():
        says(said, name, configs.describe(name))
    with pytest.raises(SystemExit) as leave:
        main.run(["--help"])
    assert leave.value.code == 0
    said = capsys.readouterr().out
    says(said, "--config.KEY=VALUE", *("train", "eval", "demo", "plan"), *DOORS)
    says(said, "python -m wmjax.main --mode=demo --config=debug_world_model")
    says(said, *(0, 1, 2, 75, 130, 143, 138))  # exit codes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], ["--config=", *configs.list_configs()]),
        (["--config=x", "--mode=fly"], ["--mode", "'fly'", "train", "eval", "demo", "plan"]),
        (["--confg=x"], ["--confg=x", "--config"]),
        (["vjepa2_aloha"], ["vjepa2_aloha", "--config=vjepa2_aloha"]),
        (["--data.fps=4"], ["--data.fps=4", "--config.data.fps=4"]),
        (["--num_steps=5"], ["--num_steps=5", "--config.train.num_steps"]),
        (["--stepz=5"], ["--stepz=5", "--config.train.num_steps"]),
        (["stray"], ["stray", "--config.KEY=VALUE"]),
        (["--config=x/debug.py"], ["--config=x/debug.py", *configs.list_configs()]),
    ],
)
def test_wrong_flags_are_named_with_what_was_meant(flags, said):
    says(answer(*flags), *said)


@pytest.mark.parametrize("name", ["wmjax.main", *DOORS])
def test_each_command_says_its_version(name, capsys):
    with pytest.raises(SystemExit) as leave:
        importlib.import_module(name if name == "wmjax.main" else f"{name}.__main__").run(
            ["--version"]
        )
    assert leave.value.code == 0
    assert capsys.readouterr().out.split() == ["wmjax", wmjax.__version__]


def test_a_flag_of_a_tool_is_answered_with_the_nearest():
    with refused("--decodee", "--decode"):
        importlib.import_module("wmjax.data.__main__").run(["check", "x", "--decodee"])


MISTAKES = """
import sys
from wmjax import main
try:
    main.run(sys.argv[1:])
except Exception as error:
    print(type(error).__name__, "jax" in sys.modules)
"""


@pytest.mark.parametrize(
    "flags",
    [
        ["--config=debug_world_model", "--config.train.num_steps=many"],
        ["--config=debug_world_model", "--config.data.frames=0"],
        ["--config=vjepa2_aloha"],
    ],
)
def test_a_mistake_is_found_before_jax_is_loaded(flags):
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES, *flags], capture_output=True, text=True, cwd=micro.ROOT
    )
    assert done.stdout.split() == ["UserError", "False"]


def test_a_python_without_its_packages_is_told_what_to_do():
    command = [sys.executable, "-S", "-m", "wmjax.main", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=micro.ROOT)
    assert done.returncode == 2
    says(done.stderr, "jax", sys.executable, "pip install", lines=2)


def test_an_old_python_is_named():
    code = "import sys; sys.version_info = (3, 9, 0); import wmjax"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=micro.ROOT
    )
    says(done.stderr.splitlines()[-1], "ImportError", "3.11")


def test_a_path_that_is_not_there_is_answered_with_the_nearest_name():
    others = set(configs.list_configs()) - {"debug_world_model"}
    suggests(answer("--config=x/debug.py"), "debug_world_model", others)


def test_the_package_is_the_same_door():
    help_of = [
        subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True)
        for name in ("wmjax", "wmjax.main")
    ]
    assert help_of[0].stdout == help_of[1].stdout
    says(help_of[0].stdout, *(f"python -m {name}" for name in DOORS))


def listing(*python, stdout):
    """Run --list with this standard output; return exit code and standard error."""
    command = [sys.executable, *python, "-m", "wmjax.main", "--list"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(("python", "code"), [([], 0), (["-u"], 128 + signal.SIGPIPE)])
def test_a_reader_who_has_seen_enough_is_no_traceback(python, code):
    here, there = os.pipe()
    os.close(here)
    assert listing(*python, stdout=there) == (code, "")
    os.close(there)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_written_is_said():
    with open("/dev/full", "w") as full:
        code, said = listing(stdout=full)
    assert code == 2
    says(said, os.strerror(errno.ENOSPC), lines=1)


DROPPED = """
import gc, signal, time
from wmjax import door

def run(argv):
    gc.callbacks.append(lambda *_: gc.callbacks.clear() or signal.raise_signal(signal.SIGINT))
    gc.collect()
    time.sleep(20)

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run behind a shell
door.run_and_exit(run, "interrupted")
"""


def test_a_ctrl_c_that_the_garbage_collector_drops_comes_again():
    done = subprocess.run([sys.executable, "-c", DROPPED], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "interrupted\n")


def test_a_recording_without_actions_is_told_what_to_write(dataset, tmp_path):
    info = dataset / "meta" / "info.json"
    left = json.loads(info.read_text())
    del left["features"]["action"]
    info.write_text(json.dumps(left))
    said = answer(*lerobot(dataset, tmp_path / "run"))
    hint = "--config.data.action=observation.state"
    says(said, "data.action='action'", dataset, hint)
    left["features"]["action.joints"] = left["features"]["observation.state"]
    info.write_text(json.dumps(left))
    said = answer(*lerobot(dataset, tmp_path / "run"))
    says(said, "data.action='action'", "action.joints")
    assert not holds(said, hint)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.cameras=wrist"], ["data.cameras='wrist'", "observation.image"]),
        (["data.fps=60"], ["data.fps=60", 10]),
        (["data.frames=400"], ["data.frames=400"]),
        (["data.image_size=36"], ["data.image_size=36", "model.patch=8", 32]),
        (["data.batch_size=12"], ["data.batch_size=12", 8, 16]),
        (["data.state=observation.joints"], ["observation.joints'", "observation.state"]),
        (["mask.short.context=0.9"], ["mask.short", 500]),
        (["model.name=vjepa3"], ["model.name='vjepa3'", "vjepa2"]),
        (["model.size=enormous"], ["model.size='enormous'", "large"]),
        (["model.remat=some"], ["model.remat='some'", "full"]),
        (["model.heads=7"], ["model.heads=7", 48]),
        (["mesh.fsdp=3"], ["mesh.fsdp=3", 8, "cpu", 3, 3]),
        (["mesh.data=3"], ["mesh.data=3", "mesh.fsdp=1", 8, "cpu", 3, 3]),
    ],
)
def test_a_bad_value_is_named_with_what_is_wanted(dataset, tmp_path, overrides, parts):
    says(answer(*lerobot(dataset, tmp_path / "run", *overrides)), *parts)


def test_a_missing_dataset_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in answer(*lerobot(tmp_path / "nowhere", tmp_path / "run"))


def test_an_unsupported_version_is_named(dataset, tmp_path):
    info = dataset / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"codebase_version": "v4.0"}))
    assert "v4.0" in answer(*lerobot(dataset, tmp_path / "run"))


def test_a_truncated_video_stops_the_run_with_its_name(dataset, tmp_path):
    video = next(dataset.rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:-2000])
    assert video.name in answer(*lerobot(dataset, tmp_path / "run"))


@pytest.mark.processes
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    flags = ("train.num_steps=100000", "train.log_every=1", "data.workers=2")
    process = subprocess.Popen(
        micro.command(tmp_path, *flags),
        env=micro.environment(1),
        cwd=micro.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + 120
    rows = tmp_path / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):  # of none that it started
        os.killpg(process.pid, 0)
    (saved,) = (int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    again = micro.run(tmp_path, f"train.num_steps={saved + 1}")
    assert lines_with(again.stdout, saved, tmp_path), again.stderr
    first, second, *_ = again.stdout.splitlines()
    says(first, wmjax.__version__, "train", "debug_world_model", tmp_path)
    says(second, "vjepa2", "tiny", 48)
    says(again.stdout, f"python -m wmjax.viz {tmp_path}")


def test_importing_wmjax_is_cheap():
    code = (
        "import sys, wmjax; print([m for m in ('jax', 'torch', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "job"),
    [
        (("--coordinator=localhost:{port}", "--processes=1", "--process=0"), {}),
        ((), {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 1, "PROCID": 0, "LOCALID": 0}),
    ],
)
def test_determinism_is_asked_for_before_the_devices_start(tmp_path, flags, job):
    """One process of a coordinator, or of Slurm, asks for its index, which starts its devices."""
    dump, port = tmp_path / "dump", cluster.free_port()
    command = micro.command(tmp_path / "run", "train.num_steps=1", "train.deterministic=True")
    done = subprocess.run(
        [*command, *(flag.format(port=port) for flag in flags)],
        env=micro.environment(1)
        | {"XLA_FLAGS": f"--xla_dump_to={dump}", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        | {f"SLURM_{name}": str(value) for name, value in job.items()}
        | {"JAX_COORDINATOR_PORT": str(port)},
        cwd=micro.ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    options = next(dump.glob("*train_step*debug_options")).read_text()
    assert "xla_gpu_deterministic_ops: true" in options


@pytest.mark.parametrize("asked", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_error(tmp_path, asked):
    env = micro.environment(1) | {"JAX_PLATFORMS": asked}
    child = subprocess.run(micro.command(tmp_path), env=env, capture_output=True, text=True)
    assert child.returncode == 2
    (line,) = [line for line in child.stderr.splitlines() if line.startswith("error")]
    assert f"JAX_PLATFORMS={asked!r}" in line
    assert "Traceback" not in child.stderr


def test_a_full_disk_behind_the_output_is_one_error():
    with open("/dev/full", "w") as full:
        child = subprocess.run(
            [sys.executable, "-m", "wmjax.main", "--list"],
            env=micro.environment(1),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1
    assert "standard output" in child.stderr


@pytest.mark.parametrize(
    ("name", "named"),
    [
        *((f"{scheme}://bucket/run", f"{scheme}:/") for scheme in ("gs", "s3", "https")),
        ("./logs:/run", "logs:/"),
        ("runs/logs:/x", "gs:/"),
        ("/s3/run", "/s3/"),
        ("back\\slash", "\\"),
        ("caf\udce9", "UTF-8"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval", "demo"])
def test_a_workdir_that_would_lose_checkpoints_is_refused(tmp_path, monkeypatch, name, named, mode):
    monkeypatch.chdir(tmp_path)
    with refused("--workdir") as caught:
        main.run(["--config=debug_world_model", f"--workdir={name}", f"--mode={mode}"])
    assert named in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_run_is_named_by_its_folder_alone(micro_run, tmp_path, capsys):
    workdir = shutil.copytree(micro_run, tmp_path / "run")
    assert main.run([f"--workdir={workdir}"]) == 0
    assert lines_with(capsys.readouterr().out, workdir, "train.num_steps=3")
    changes = ("--config.train.num_steps=4", "--config.optim.weight_decay=0.5")
    assert main.run([f"--config={workdir}/config.json", *changes]) == 0
    assert lines_with(capsys.readouterr().out, "optim.weight_decay", 0.5, 0.04)
    assert [row["step"] for row in micro.rows(workdir)] == [1, 2, 3, 4]
    evaluators = "--config.eval.evaluators=validation"
    assert main.run([f"--workdir={workdir}", "--mode=eval", evaluators]) == 0
    assert json.loads((workdir / "evals.jsonl").read_text())["step"] == 4


def test_other_paths_train_and_resume(tmp_path):
    workdir = tmp_path / "exp[lr=3e-4]*? größe (2) %d~#{a}'\"$x;&"
    micro.train(micro.config("train.num_steps=1"), workdir)
    assert micro.train(micro.config("train.num_steps=2"), workdir) == 0
    assert [row["step"] for row in micro.rows(workdir)] == [1, 2]
    assert "encoder" in repr(wmjax.load(workdir))
