"""Checkpoints without a run: which are kept, and that they come back as they were saved."""

import errno
import logging
import math
import os

import disks
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from clu import metrics as clu_metrics
from says import refused, says

from wmjax.errors import UserError
from wmjax.run import guard, manifest, reporter, saved
from wmjax.run.checkpoint import Checkpoints
from wmjax.run.saved import Saved
from wmjax.step import TrainState


def state_of(**params):
    return TrainState(jnp.int32(3), params, {}, {}, {})


STATE = state_of(w=jnp.linspace(0.0, 1.0, 7))


@pytest.mark.parametrize(
    ("period", "kept"), [(0, ["10", "12"]), (4, ["4", "8", "10", "12"]), (100, ["10", "12"])]
)
def test_the_newest_are_kept_and_those_of_the_period(tmp_path, period, kept):
    with Checkpoints(tmp_path, keep=2, keep_period=period) as checkpoints:
        for step in range(2, 13, 2):
            checkpoints.save(step, STATE, {"position": step}, {})
    assert sorted((path.name for path in tmp_path.iterdir()), key=int) == kept


def test_what_was_saved_comes_back_by_both_ways(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, STATE, {"position": 40}, {"config": {"seed": 1}})
        checkpoints.wait()
        restored = checkpoints.restore(5, STATE)
    assert (restored.data, restored.meta) == ({"position": 40}, {"config": {"seed": 1}})
    saved = Saved(tmp_path)
    assert (saved.step, saved.meta) == (5, restored.meta)
    for state in (restored.state, saved.restore(STATE, "x")):
        np.testing.assert_array_equal(state.params["w"], STATE.params["w"])
    assert saved.read(["params.w"])["params.w"].tolist() == STATE.params["w"].tolist()


def test_its_json_is_strict_and_its_numbers_come_back(tmp_path):
    meta = {"config": {"clip": math.inf}, "statistics": [{"mean": [0.5, -math.inf]}]}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, STATE, {"position": 40}, meta)
    text = (tmp_path / "5/meta/metadata").read_text()
    assert '"Infinity"' in text
    assert "Infinity" not in text.replace('"Infinity"', "").replace('"-Infinity"', "")
    assert Saved(tmp_path).meta == meta


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (state_of(w=jnp.zeros(8)), ("(7,)", "(8,)")),
        (state_of(w=jnp.zeros(7, jnp.bfloat16)), ("float32", "bfloat16")),
        (state_of(), ("float32(7,)", "none")),
    ],
)
def test_another_array_is_named_by_both_ways(tmp_path, wanted, named):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, STATE, {}, {})
        checkpoints.wait()
        for restore in (
            lambda: checkpoints.restore(5, wanted),
            lambda: Saved(tmp_path).restore(wanted, "x"),
        ):
            with pytest.raises(UserError) as error:
                restore()
            assert all(text in str(error.value) for text in ("params.w", *named))
            assert len(str(error.value).splitlines()) <= 3


# What is certified can be restored


@pytest.mark.parametrize("name", ["exp[lr=3e-4]", "a*", "a?b", "**", "~", "5.orbax-checkpoint-tmp"])
def test_whatever_the_path_what_was_saved_comes_back(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    for step in (5, 7):
        with Checkpoints(folder, keep=2) as checkpoints:
            checkpoints.save(step, STATE, {"position": step}, {})
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore(7, STATE)
    assert restored.data == {"position": 7}
    for state in (restored.state, Saved(folder).restore(STATE, "x")):
        np.testing.assert_array_equal(state.params["w"], STATE.params["w"])


def test_a_path_is_no_pattern_that_finds_the_parts_of_another_run(tmp_path):
    other, folder = tmp_path / "exp1/checkpoints", tmp_path / "exp*/checkpoints"
    with Checkpoints(other, keep=2) as checkpoints:
        checkpoints.save(5, state_of(theirs=jnp.ones(3)), {}, {})
    (other / "5").rename(other / "5.orbax-checkpoint-tmp")  # as a kill leaves it
    state = other / "5.orbax-checkpoint-tmp/state"
    state.rename(f"{state}.orbax-checkpoint-tmp")
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(5, STATE, {}, {})
    theirs = {path.name for path in other.glob("*/*/ocdbt.process_*/d/*")}
    merged = (folder / "5/state/manifest.ocdbt").read_bytes()
    merged += b"".join(path.read_bytes() for path in (folder / "5/state/d").iterdir())
    assert theirs
    assert not [name for name in theirs if name.encode() in merged]


@pytest.mark.parametrize(("name", "named"), [("a\\b", "\\"), ("é\udce9", "UTF-8"), ("gs:", "gs:/")])
def test_weights_of_a_path_that_orbax_does_not_read_are_refused(tmp_path, name, named):
    folder = tmp_path / name / "checkpoints"
    folder.mkdir(parents=True)
    with refused(lines=1) as told:
        Saved(folder)
    assert named in str(told.value).removeprefix(str(folder.parent))


def lose_the_index(folder):
    (folder / "state/manifest.ocdbt").unlink()


def lose_the_values(folder):  # of larger arrays: short ones are in the index
    for path in folder.glob("state/ocdbt.process_*/d/*"):
        path.unlink()


@pytest.mark.parametrize("lose", [lose_the_index, lose_the_values])
def test_what_cannot_be_restored_is_not_certified(tmp_path, monkeypatch, capsys, lose):
    finalize = ocp.CompositeCheckpointHandler.finalize

    def losing(self, folder):
        finalize(self, folder)
        lose(folder)

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", losing)
    with refused(tmp_path / "5", "restored", "none"), Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, state_of(w=jnp.arange(1000.0)), {}, {})
    assert not list(tmp_path.iterdir())


def test_a_save_of_other_arrays_than_the_state_is_not_certified(tmp_path, monkeypatch):
    save, without = ocp.args.StandardSave, {"params": {"v": jnp.zeros(2)}}
    with (
        refused(tmp_path / "7", "params.", "float32(7,)", "step 5"),
        Checkpoints(tmp_path, keep=2) as checkpoints,
    ):
        checkpoints.save(5, STATE, {}, {})
        checkpoints.wait()
        monkeypatch.setattr(ocp.args, "StandardSave", lambda trees: save(trees | without))
        checkpoints.save(7, STATE, {}, {})
    assert Saved(tmp_path).step == 5


def test_the_first_save_is_read_back_in_parts_and_later_ones_by_their_shapes(tmp_path, monkeypatch):
    read, seen = saved._read, []

    def counted(folder, leaves):
        seen.append([leaf.shape for _, leaf in leaves])
        return read(folder, leaves)

    monkeypatch.setattr(saved, "_read", counted)
    monkeypatch.setattr(saved, "_READ_BYTES", 4000)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 7):
            checkpoints.save(step, state_of(**{k: jnp.ones((600,)) for k in "abc"}), {}, {})
    assert sorted(shape for part in seen for shape in part) == [(), (600,), (600,), (600,)]
    assert len(seen) == 3


def test_warnings_of_libraries_are_heard_and_tracebacks_of_failed_writes_are_not(tmp_path, caplog):
    def of_orbax():
        ocp.JsonCheckpointHandler().restore(tmp_path / "none")

    def of_tensorstore():
        raise ValueError("Error writing [os_error_code='28']")

    def of_the_user():
        raise ValueError("my own task")

    with Checkpoints(tmp_path, keep=1):
        for name in ("absl", "asyncio"):
            monitored = logging.getLogger(name)
            monitored.addHandler(caplog.handler)
            try:
                monitored.warning("nothing merged")
                for fails in (of_orbax, of_tensorstore, of_the_user):
                    try:
                        fails()
                    except (OSError, ValueError):
                        monitored.exception(fails.__name__)
            finally:
                monitored.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert said == {"nothing merged", "of_the_user"}


# Diverged weights do not push out sound ones


def kept_after(folder, keep, verdicts, **settings):
    """Save steps 1, 2, ...; verdict I is of the steps after save I. Return the steps on disk."""
    for step in range(1, len(verdicts) + 2):  # each by a process of its own, as after a resume
        with Checkpoints(folder, keep=keep, **settings) as checkpoints:
            checkpoints.save(step, STATE, {}, {}, lambda saved: verdicts[saved - 1])
    return sorted(int(path.name) for path in folder.iterdir())


def test_the_newest_proven_one_is_kept_whatever_comes_later(tmp_path):
    for number, (keep, verdicts, kept) in enumerate(
        [
            (3, [1, 1, 0, 0, 0, 0, 0], [2, 6, 7, 8]),
            (3, [1, 1, 1, 1, 1], [4, 5, 6]),
            (3, [1, 0, 0, 0, 1, 0], [5, 6, 7]),
            (3, [0, 0, 0, 0, 0], [4, 5, 6]),
            (1, [1, 1, 0, 0], [2, 5]),
        ]
    ):
        assert kept_after(tmp_path / str(number), keep, verdicts) == kept
    assert kept_after(tmp_path / "period", 1, [1, 1, 0, 0, 0, 0], keep_period=3) == [2, 3, 6, 7]


def test_a_run_that_ends_says_which_checkpoint_is_sound_and_only_one_that_is_there(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        says(checkpoints.kept(lambda step: True), tmp_path, 0, "--workdir", lines=1)
        checkpoints.save(4, STATE, {}, {})
        says(checkpoints.kept(lambda step: False), tmp_path, 1, "--workdir", lines=1)
        said = checkpoints.kept(lambda step: step == 4)
        says(said, tmp_path / "4", "kept", lines=1)
        checkpoints.save(5, STATE, {}, {})
        checkpoints.save(6, STATE, {}, {}, lambda step: False)
        says(checkpoints.kept(lambda step: False), tmp_path / "4", "kept", "5, 6", lines=1)
    with Checkpoints(tmp_path, keep=3) as checkpoints:  # the marks are still there
        says(checkpoints.kept(lambda step: False), tmp_path / "4", "kept", "5, 6", lines=1)
        says(checkpoints.kept(lambda step: True), tmp_path / "6", "kept", lines=1)


def looked(steps, unsound, window=()):
    """Return a guard that has looked at steps; some were skipped, some had a spike."""

    def one(value):
        return clu_metrics.Average.from_model_output(jnp.full((1,), value))

    watching = guard.Guard(10**6, lambda *_: None, lambda proves: "")
    watching._skipped = lambda step, batch: watching._unsound.append(step)
    for step in range(1, steps + 1):
        loss = 50.0 if step in window else 1.0 + 0.001 * (step % 7)
        watching.look(step, {"loss": one(loss), "skipped_updates": one(step in unsound)}, None)
    return watching


def test_steps_prove_a_checkpoint_when_they_are_finite_and_do_not_jump(capsys, monkeypatch):
    monkeypatch.setattr(guard, "PROOF", 20)
    clean = looked(10, ())
    assert (clean.proves(9), clean.proves(10), clean.proves(11)) == (True, False, False)
    skipped = looked(10, {6})
    assert [skipped.proves(step) for step in (4, 5, 6, 7)] == [False, False, True, True]
    early, late = looked(40, {22}), looked(40, {21})
    assert (early.proves(1), late.proves(1)) == (True, False)  # 20 sound steps, and 19
    spike = looked(80, (), window={70})
    assert [spike.proves(step) for step in (60, 69, 70)] == [False, False, True]


# Disks that fail


def failed_save(folder, capsys, state):
    """Save step 4 between those of 2 and 6; return what was printed of it."""
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(2, state, {}, {})
        checkpoints.wait()
        capsys.readouterr()
        yield
        checkpoints.save(4, state, {}, {})
        checkpoints.wait()
        yield capsys.readouterr()
        checkpoints.save(6, state, {}, {})
    assert sorted(path.name for path in folder.iterdir()) == ["2", "6"]
    assert Saved(folder).step == 6


MANY = state_of(**{f"w{i}": jnp.arange(5000.0) * i for i in range(12)})


def test_a_full_disk_is_one_line_and_leaves_no_folder(tmp_path, capfd, caplog):
    saving = failed_save(tmp_path, capfd, MANY)
    next(saving)
    with disks.full_disk():
        said = next(saving)
    says(said.out, "warning", tmp_path / "4", os.strerror(errno.EFBIG), lines=1)
    assert said.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert not list(saving)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("4.orbax-checkpoint-tmp", errno.EIO),
        ("data.orbax-checkpoint-tmp/metadata", errno.EDQUOT),  # while arrays are written
        ("_CHECKPOINT_METADATA", errno.ESTALE),  # which Orbax raises twice
        ("manifest.json.part", errno.ENOSPC),
    ],
)
def test_one_file_or_folder_that_cannot_be_made_is_one_line(tmp_path, capfd, caplog, part, code):
    saving = failed_save(tmp_path, capfd, MANY)
    next(saving)
    with pytest.MonkeyPatch.context() as monkeypatch:
        disks.refuse(monkeypatch, part, code)
        said = next(saving)
    says(said.out, "warning", tmp_path / "4", os.strerror(code), lines=1)
    assert said.err == ""
    assert not list(saving)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_last_save_that_fails_is_one_error(tmp_path, capfd):
    with (
        refused(tmp_path / "4", os.strerror(errno.EFBIG), "step 2", lines=2),
        disks.full_disk(size=8192),
        Checkpoints(tmp_path, keep=3) as checkpoints,
    ):
        checkpoints.save(2, STATE, {}, {})
        checkpoints.save(4, MANY, {}, {})
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


# Damage, and what belongs to the user


def test_a_file_of_another_size_is_not_hashed(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(2, MANY, {}, {})
    with (tmp_path / "2/meta/metadata").open("a") as file:
        file.write(" ")
    hashed, entry = [], manifest._entry
    monkeypatch.setattr(manifest, "_entry", lambda path: hashed.append(path) or entry(path))
    says(manifest.fault(tmp_path / "2"), "meta/metadata", 2, 3)
    assert not hashed


def test_odd_names_are_left_alone(tmp_path, capsys):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    names = (
        "12abc",
        "003",
        "\u0663",
        "\u00b2",
        "-5",
        "7.5",
        "mine.deleted",
        "1e3",
        "a.orbax-checkpoint-tmp",
    )
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "note").touch()
    (folder / "9").touch()
    (folder / "8.deleted").touch()
    with Checkpoints(elsewhere, keep=1) as checkpoints:
        checkpoints.save(1, STATE, {}, {})
    (folder / "1").symlink_to(elsewhere / "1")
    before = {path.name for path in folder.iterdir()}
    assert saved.rules_of(folder) == 1
    for steps in ((2, 3, 4), (5, 6)):
        with Checkpoints(folder, keep=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, STATE, {}, {})
    assert {path.name for path in folder.iterdir()} == before | {"5", "6"}
    assert all((folder / name / "note").exists() for name in names)
    assert Saved(folder).step == 6
    assert (elsewhere / "1/manifest.json").exists()
    assert capsys.readouterr().out == ""


def test_metrics_that_cannot_be_rewritten_are_one_warning_and_come_back(
    tmp_path, capsys, monkeypatch
):
    settings = {"tensorboard": False, "wandb": False, "wandb_project": "", "figures": False}
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    with monkeypatch.context() as broken:
        disks.refuse(broken, "metrics.jsonl.part", errno.ENOSPC)
        writing = reporter.Reporter(
            tmp_path, num_steps=4, start=1, config={}, alarms=lambda *_: [], **settings
        )
    said = capsys.readouterr().out
    says(said, "warning", path, os.strerror(errno.ENOSPC), lines=1)
    assert "off" not in said.split()
    with writing:
        writing.note(2, {})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
