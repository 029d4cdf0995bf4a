"""One owner for a workdir: a second run is refused, a dead owner is not in the way."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import micro
import pytest
from says import refused

from wmjax.run import owner
from wmjax.run.owner import NAME, Owner


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(owner, "TOUCHED_S", 0.05)
    monkeypatch.setattr(owner, "STALE_S", 0.5)


def write(workdir, **changes):
    """Leave the file of another owner."""
    mine = {"host": os.uname().nodename, "pid": os.getpid(), "started": owner._started(os.getpid())}
    (workdir / NAME).write_text(json.dumps({**mine, "token": "x", **changes}))


def test_a_second_owner_is_refused_and_the_first_gives_it_back(tmp_path):
    with Owner(tmp_path, "abc") as first:
        with refused(str(tmp_path), os.getpid(), "abc", "--workdir"), Owner(tmp_path, "d"):
            pass
        first.check()
    assert not any(tmp_path.iterdir())
    with Owner(tmp_path, "d"):
        pass


def ended_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},
        {"started": "another boot 17"},  # the number was given to another process
        {"host": "elsewhere"},  # it is not touched any more
    ],
)
def test_a_dead_owner_is_not_in_the_way(tmp_path, changes):
    write(tmp_path, **changes)
    with Owner(tmp_path, "abc") as mine:
        mine.check()


def test_a_process_that_ended_is_dead(tmp_path):
    write(tmp_path, pid=ended_pid())
    with Owner(tmp_path, "abc"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}"])
def test_a_broken_file_is_waited_for_and_taken(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with Owner(tmp_path, "abc") as mine:
        mine.check()


def test_an_owner_on_another_machine_shows_itself(tmp_path):
    write(tmp_path, host="elsewhere")
    ended = threading.Event()

    def touch():
        while not ended.wait(0.05):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=touch)
    thread.start()
    with refused("elsewhere", os.getpid()), Owner(tmp_path, "abc"):
        pass
    ended.set()
    thread.join()


def test_of_many_that_find_a_dead_owner_one_gets_it(tmp_path):
    write(tmp_path, pid=2**22 + 1)
    holders, done = [], threading.Event()

    def take():
        try:
            with Owner(tmp_path, "abc") as mine:
                holders.append(mine)
                done.wait(5)
                mine.check()
        except Exception:
            return

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    done.set()
    for thread in threads:
        thread.join()
    assert len(holders) == 1


def replace(workdir):
    """Leave a copy, whose owner.json says the same, in the place of the folder."""
    workdir.rename(workdir.with_name("moved"))
    shutil.copytree(workdir.with_name("moved"), workdir)


def empty(workdir):
    """Leave the folder that is there when a disk is unmounted."""
    workdir.rename(workdir.with_name("moved"))
    workdir.mkdir()


@pytest.mark.parametrize("lose", [shutil.rmtree, replace, empty])
def test_a_workdir_that_is_another_folder_is_left_alone(tmp_path, lose):
    workdir = tmp_path / "run"
    with Owner(workdir, "abc") as mine:
        mine.check()
        lose(workdir)
        left = sorted(tmp_path.rglob("*"))
        with refused(f"--workdir={workdir}", lines=1):
            mine.check()
    assert sorted(tmp_path.rglob("*")) == left


def take(workdir):
    write(workdir, token="another", pid=1)


@pytest.mark.parametrize(("lose", "named"), [(take, 1), (empty, "--workdir")])
def test_a_run_that_lost_its_workdir_writes_nothing_more(tmp_path, lose, named):
    workdir = tmp_path / "run"

    def after(step, *_):
        if step == 2:
            lose(workdir)

    with refused(workdir, named):
        micro.train(micro.config("checkpoint.every=3"), workdir, on_step=after)
    assert not any(path.name.isdigit() for path in workdir.glob("checkpoints/*"))
    if lose is take:
        assert json.loads((workdir / NAME).read_text())["token"] == "another"
    else:
        assert not any(workdir.iterdir())


def test_a_second_run_ends_with_code_2_and_leaves_the_first_alone(tmp_path):
    with Owner(tmp_path, "abc"):
        child = subprocess.run(
            micro.command(tmp_path), env=micro.environment(1), capture_output=True, text=True
        )
    assert child.returncode == 2
    assert str(os.getpid()) in child.stderr
    assert [path.name for path in tmp_path.iterdir()] == []
