"""Worker processes: the same clips and errors as threads, and nothing left behind."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import micro
import numpy as np
import pytest
from recordings import VIDEO, missing_names, open_pusht, reader_of, refused, write_v2
from shared_data import PUSHT
from test_pipeline import damaged, equal, pusht, stream, take  # noqa: F401

from wmjax import open_sources
from wmjax.data.mixture import Mixture
from wmjax.data.synthetic import SyntheticSource
from wmjax.data.workers import Workers
from wmjax.errors import ClipError


@pytest.fixture
def started():
    """Return a function that starts workers; they are closed after the test."""
    every = []

    def start(reader, count=1):
        every.append(Workers(reader, count))
        return every[-1]

    yield start
    for workers in every:
        workers.close()


def test_batches_and_positions_are_those_of_threads_whatever_the_number():
    whole = take(4, *pusht())
    batches = stream(*pusht("data.workers=3", "data.prefetch=40"))
    equal(whole[:2], [jax.device_get(next(batches)) for _ in range(2)])
    assert batches.position == 16
    batches.close()
    equal(whole[2:], take(2, *pusht("data.workers=1"), position=16))


def test_as_many_processes_as_threads_but_no_more_than_cores(monkeypatch):
    def count(*overrides):
        return open_sources.count_workers(micro.config(*overrides).data)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert count() == 0  # generated video, a hundred steps of it
    assert count("data.workers=-1", "data.threads=4") == 4
    assert count("data.workers=-1", "data.threads=16") == 6
    assert count("data.workers=9", "data.threads=2") == 9


def test_a_clip_is_the_same_in_every_array(started):
    """In a mixture whose parts lack views, numbers and, past the end of an episode, steps."""
    common = {"frames": 4, "height": 32, "width": 48, "seed": 0, "split": "train"}
    sources = {
        "recorded": open_pusht(ends="repeat", clips_per_episode=9),
        "generated": SyntheticSource(views=2, num_samples=9, **common),
    }
    reader = reader_of(Mixture(sources, dict.fromkeys(sources, 1)))
    workers = started(reader)
    for number in (0, 7, 8, 44, 45, 53):
        (clip, _), (same, _) = reader.read(number, number), workers.read(number, number)
        assert list(clip) == list(same) == list(reader.dtype.names)
        for name, value in clip.items():
            np.testing.assert_array_equal(same[name], value, strict=name != "skipped")


def test_tables_are_held_once_for_all_processes(started, monkeypatch):
    """Large arrays are sent out of band; the pickle itself stays small."""
    source = open_pusht()
    source._tables["observation.state"] = np.tile(source._tables["observation.state"], (2000, 1))
    sizes = []
    dump = sys.modules[Workers.__module__]._dump

    def measured(reader, image):
        parts = dump(reader, image)
        sizes.extend(end - start for start, end in parts)
        return parts

    monkeypatch.setattr(sys.modules[Workers.__module__], "_dump", measured)
    started(reader_of(source)).read(0, 0)
    assert source._tables["observation.state"].nbytes in sizes
    assert sizes[0] < 20_000


def test_skipped_clips_are_the_same_named_once_and_limited(damaged, capfd):  # noqa: F811
    skip = (*damaged, "data.on_error=skip", "data.max_skip_share=0.004")
    found = []
    for how in ("data.threads=4", "data.workers=2"):
        batches = stream(*skip, how)
        taken = []
        with refused("data.max_skip_share=0.004", 2, "episode 1") as said:
            taken.extend(jax.device_get(batch) for batch in batches)
        found.append((taken, str(said.value), batches.position, batches.report()))
        batches.close()
    equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    said = capfd.readouterr().err.splitlines()
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    assert [line for line in said if "on_error" not in line and "episode 1" not in line] == []


def test_errors_arrive_as_they_were(started, tmp_path):
    root = shutil.copytree(PUSHT, tmp_path / "pusht")
    (root / VIDEO).write_bytes((root / VIDEO).read_bytes()[:5000])
    reader = reader_of(open_pusht(root))
    workers = started(reader)
    errors = []
    for read in (reader.read, workers.read, workers.read):
        with pytest.raises(ClipError) as error:
            read(0, 0)
        errors.append((str(error.value), error.value.where))
    assert errors[0] == errors[1] == errors[2]


def test_a_mistake_arrives_with_its_traceback_and_a_refusal_as_its_line(started):
    reader = reader_of(open_pusht())
    strategy, budget, options = reader._masks._masks["m"]
    reader._masks._masks["m"] = (strategy, budget._replace(context=99), options)
    with refused(99, lines=1):
        started(reader).read(0, 0)
    reader._source._frames = None
    with pytest.raises(RuntimeError) as error:
        started(reader).read(0, 0)
    assert not missing_names(str(error.value), "Traceback", "AttributeError", "_read_video")


def test_a_process_that_is_killed_is_one_line_not_a_wait():
    batches = stream(*pusht("data.workers=2"))
    next(batches)
    victim, other = batches._workers._processes
    victim.kill()
    with refused("data.workers=2", "SIGKILL", lines=1):
        for _ in batches:
            pass
    assert other.poll() is None
    batches.close()
    assert other.returncode == -signal.SIGKILL


def test_closing_leaves_no_process_and_no_descriptor():
    def held():
        return len(os.listdir("/dev/fd"))

    take(1, *pusht("data.workers=0"))
    before = held()
    for _ in range(2):
        batches = stream(*pusht("data.workers=2"))
        processes = batches._workers._processes
        next(batches)
        assert [process.poll() for process in processes] == [None, None]
        batches.close()
        assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
        del batches
    deadline = time.monotonic() + 30
    while held() > before:  # threads and their errors hold pipes for a moment
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.02)


STRANGERS = ("av", "numpy", "queue", "pickle", "signal", "sitecustomize", "argparse", "wmjax_x")


@pytest.fixture
def strange(tmp_path):
    """A folder with modules that leave a file behind where one of them runs."""
    for name in STRANGERS:
        code = f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')"
        (tmp_path / f"{name}.py").write_text(code)
    return tmp_path


@pytest.mark.parametrize("python", [("-I",), ()])
def test_workers_run_no_code_of_the_current_folder(strange, python):
    path = [str(micro.ROOT), str(micro.ROOT / "tests")]
    code = (
        f"import sys; sys.path[:] = {path} + [p for p in sys.path if p]\n"
        "from recordings import open_pusht, reader_of\n"
        "from wmjax.data.workers import Workers\n"
        "sys.path.insert(0, '')\n"
        "Workers(reader_of(open_pusht()), 1).read(0, 0)"
    )
    done = subprocess.run(
        [sys.executable, *python, "-c", code], cwd=strange, env=micro.environment(1)
    )
    assert done.returncode == 0
    assert not (strange / "ran").exists()


@pytest.mark.processes
@pytest.mark.parametrize("command", ["train", "transcode"])
def test_the_doors_run_no_code_of_the_current_folder(strange, command):
    flags = {
        "train": [
            *("wmjax.main", "--config=debug_world_model", "--workdir=run"),
            *(f"--config.{each}" for each in (*micro.OVERRIDES, "train.num_steps=1")),
            *("--config.data.source=lerobot", f"--config.data.root={PUSHT}"),
            *("--config.data.image_size=32", "--config.data.workers=1"),
        ],
        "transcode": ["wmjax.data", "transcode", str(write_v2(strange / "v2")), "out", "--size=48"],
    }[command]
    done = subprocess.run(
        [sys.executable, "-m", *flags], cwd=strange, env=micro.environment(1), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert not (strange / "ran").exists(), (strange / "ran").read_text()


def test_processes_end_with_a_parent_that_is_killed():
    code = (
        "from recordings import open_pusht, reader_of\n"
        "from wmjax.data.workers import Workers\n"
        "workers = Workers(reader_of(open_pusht()), 2)\n"
        "workers.read(0, 0)\n"
        "print('reading', flush=True)\n"
        "while True: workers.read(0, 0)"
    )
    path = os.pathsep.join([str(micro.ROOT), str(micro.ROOT / "tests")])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=micro.environment(1) | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout.readline() == "reading\n"
        parent.kill()
        # The workers inherited this pipe: it closes when the last of them exits.
        assert parent.communicate(timeout=30) == ("", "")
