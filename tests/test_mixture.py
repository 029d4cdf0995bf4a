"""Mixtures of datasets that differ in everything: one shape, the shares asked for, exact resume."""

import shutil

import jax
import micro
import numpy as np
import pytest
from says import refused, says, suggests
from shared_data import PUSHT, SHARED, needs_shared
from test_pipeline import equal, stream, take

from wmjax import assemble, open_sources
from wmjax.data.mixture import Mixture
from wmjax.data.pipeline import _order
from wmjax.data.synthetic import SyntheticSource
from wmjax.evals import Context, Unavailable
from wmjax.evals.probe import Probe
from wmjax.run.checkpoint import Checkpoints


def mixture(*overrides, **members):
    config = micro.config(
        "data.source=lerobot", "data.fps=4", "data.crop_scale=(0.3,1.0)", *overrides
    )
    config.data.members = {name: {"cameras": cameras} for name, cameras in members.items()}
    return config


def real(*overrides):
    """G1 (30 fps, 26 numbers), PushT (10 fps, 2) and ALOHA (50 fps, 14, two cameras)."""
    shares = {"g1_subset_v30": 5, "pusht_sim_v3": 3, "aloha_sim_twocam_v3": 2}
    text = ",".join(f"{SHARED / name}:{share}" for name, share in shares.items())
    return (f"data.mixture={text}", "data.source=lerobot", "data.fps=4", *overrides)


@pytest.fixture
def two():
    """Generated sources of different shapes, 40 and 7 clips long."""
    common = {"frames": 2, "height": 16, "width": 16, "seed": 0, "split": "train"}
    return {
        "wide": SyntheticSource(views=2, stride=3, num_samples=40, **common),
        "narrow": SyntheticSource(views=1, stride=1, num_samples=7, **common),
    }


def test_clips_of_all_are_brought_to_the_shape_of_the_widest(two):
    two["wide"].state_size = 8  # wider than its clips are: so both are padded
    mixed = Mixture(two, {"wide": 1, "narrow": 1})
    assert len(mixed) == 47
    clip, plain = mixed[40 + 3], two["narrow"][3]
    assert mixed.locate(43) == (1, 3)
    assert [len(frames) for frames in clip["frames_VT"]] == [2, 0]
    assert clip["state_TS"].shape == (2, 8)
    np.testing.assert_array_equal(clip["state_TS"][:, :6], plain["state_TS"])
    assert clip["state_mask_TS"].tolist() == [[True] * 6 + [False] * 2] * 2
    assert clip["action_TPA"].shape == (2, 3, 6)
    np.testing.assert_array_equal(clip["action_TPA"][:, :1], plain["action_TPA"])
    assert clip["action_mask_TPA"].any((0, 2)).tolist() == [True, False, False]
    assert not clip["action_TPA"][~clip["action_mask_TPA"]].any()
    np.testing.assert_array_equal(mixed[5]["action_TPA"], two["wide"][5]["action_TPA"])


def test_parts_and_draws_cover_each_source(two):
    mixed = Mixture(two, {"wide": 1, "narrow": 3})
    assert [(p.name, p.draws, p.weight) for p in mixed.datasets] == [
        ("wide", range(40), 0.25),
        ("narrow", range(40, 47), 0.75),
    ]
    rng = np.random.default_rng(0)
    assert [mixed.locate(mixed.draw(n, rng)) for n in (0, 39, 40, 46)] == [
        (0, 0), (0, 39), (1, 0), (1, 6),
    ]  # fmt: skip


def test_each_dataset_is_gone_through_evenly_at_its_own_pace(two):
    order = _order(Mixture(two, {"wide": 3, "narrow": 1}), seed=0)
    drawn = np.array([order[position] for position in range(64 * 7)])
    counts = np.bincount(drawn, minlength=47)
    assert set(counts[:40]) == {8, 9}  # 336 draws of 40
    assert set(counts[40:]) == {16}  # 112 draws of 7
    assert list(drawn[:64]) != list(drawn[64:128])


def test_labels_are_those_that_all_have_in_one_size_and_belong_to_their_clips(tmp_path, capsys):
    again = shutil.copytree(PUSHT, tmp_path / "again")
    overrides = (f"data.mixture={PUSHT}:1,{again}:2", "data.source=lerobot", "data.ends=repeat")
    config = micro.config(*overrides, "data.fps=5")
    source = open_sources.make_source(config, "train")
    assert source.label_sizes == {"observation.state": 2}
    owners = {}
    for batch in take(4, *overrides, "data.fps=5"):
        ids = zip(batch.dataset_ids_B.tolist(), batch.sample_ids_B.tolist(), strict=True)
        for row, (part, index) in enumerate(ids):
            episode, labels = source.labels(part, index)
            state_TS = batch.observation.state_BTS[row]
            np.testing.assert_array_equal(labels["observation.state"], state_TS)
            assert owners.setdefault(episode, part) == part
    assert set(owners.values()) == {0, 1}
    with refused("eval.labels='speed'", "data.mixture", "pusht_sim_v3"):
        open_sources.make_source(micro.config(*overrides, "eval.labels=speed"), "train")


def test_without_a_common_label_there_is_no_probe_and_a_line_says_so(two):
    two["wide"].label_sizes = {"state": 6, "other": 1}
    assert Mixture(two, {"wide": 1, "narrow": 1}).label_sizes == {"state": 6}
    two["wide"].label_sizes = {"state": 8}
    mixed = Mixture(two, {"wide": 1, "narrow": 1})
    with pytest.raises(Unavailable) as reason:
        Probe(Context(None, {"train": mixed}, None, {"eval": {"probe_every": 1}}, None, None))
    says(reason, "eval.labels", lines=1)


@needs_shared
def test_a_batch_of_three_robots_has_one_shape_and_says_what_is_there():
    rows = [0, 0, 0]
    for batch in take(8, *real()):
        seen = batch.observation
        assert seen.video_BVTHWC.shape == (8, 2, 4, 32, 32, 3)
        assert seen.state_BTS.shape == seen.state_mask_BTS.shape == (8, 4, 26)
        assert batch.action_BTPA.shape == batch.action_mask_BTPA.shape == (8, 4, 13, 26)
        for row, dataset in enumerate(batch.dataset_ids_B):
            views, stride, size = [(1, 8, 26), (1, 3, 2), (2, 13, 14)][dataset]
            rows[dataset] += 1
            assert seen.view_mask_BV[row].sum() == views
            assert not seen.video_BVTHWC[row, views:].any()
            assert seen.video_BVTHWC[row, :views].any((1, 2, 3, 4)).all()
            assert (seen.state_mask_BTS[row].sum(-1) == size).all()
            assert not seen.state_BTS[row, :, size:].any()
            assert batch.action_mask_BTPA[row, 0, :, 0].sum() == stride
            assert not batch.action_BTPA[row, :, stride:].any()
            assert not batch.action_BTPA[row, ..., size:].any()
            assert not batch.action_mask_BTPA[row, ..., size:].any()
    np.testing.assert_allclose(rows, [32, 19.2, 12.8], atol=1)  # of 64 clips


@needs_shared
def test_a_jump_threads_and_processes_change_nothing_in_a_mixture(monkeypatch):
    straight = take(4, *real("data.threads=8"))
    equal(straight[2:], take(2, *real("data.threads=1"), position=16))
    batches = stream(*real())
    next(batches)
    assert batches.position == 8
    batches.close()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda _, x: x)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        part = take(2, *real())
        # Every second clip of the global batch, whose order the single process keeps.
        equal(part, jax.tree.map(lambda x, process=process: x[process::2], straight[:2]))
        assert all(len(set(b.dataset_ids_B.tolist())) > 1 for b in part)


@needs_shared
def test_a_run_compiles_once_logs_its_shares_and_keeps_the_statistics(tmp_path, caplog):
    config = micro.config(*real("train.num_steps=8", "train.log_every=4", "data.on_error=skip"))
    with jax.log_compiles():
        micro.train(config, tmp_path)
    compiled = [text for text in caplog.messages if text.startswith("Finished XLA compilation")]
    assert sum("train_step" in text for text in compiled) == 1
    names = ["g1_subset_v30", "pusht_sim_v3", "aloha_sim_twocam_v3"]
    shares = [[row[f"mixture/{name}"] for name in names] for row in micro.rows(tmp_path)]
    np.testing.assert_allclose(np.sum(shares, axis=1), 1)
    np.testing.assert_allclose(np.mean(shares, axis=0), [0.5, 0.3, 0.2], atol=1 / 64)
    assert shares[0] != shares[1]  # each of its own interval
    assert [row["data_skipped"] for row in micro.rows(tmp_path)] == [0, 0]
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        abstract = micro.prepare(config).steps.abstract
        restored = checkpoints.restore(8, abstract)
    assert restored.data == {"position": 64}
    statistics = restored.meta["statistics"]
    assert statistics == open_sources.make_source(config, "train").statistics()
    assert [s["name"] for s in statistics] == names
    assert [len(s["action"]["mean"]) for s in statistics] == [26, 2, 14]


def test_settings_of_one_dataset():
    other = PUSHT.parent / "other" / ".." / "pusht_sim_v3"
    config = mixture(f"data.mixture={PUSHT}:1", pusht_sim_v3="image")
    whole, each = open_sources.make_source(config, "train").describe().splitlines()
    says(whole, 1, 1)  # dataset, view
    says(each, "pusht_sim_v3", "100.0%")
    config = mixture(f"data.mixture={PUSHT}:1", pusht_sim_v3="wrist")
    with refused("data.cameras='wrist'", "data.mixture", "pusht_sim_v3"):
        open_sources.make_source(config, "train")
    with refused("data.mixture", "pusht_sim_v3", PUSHT, other):
        assemble.check(mixture(f"data.mixture={PUSHT}:1,{other}:1"))


@pytest.mark.parametrize(
    ("text", "members", "named"),
    [
        ("a", {}, ["'a'", "DIR:WEIGHT"]),
        ("a:0.5,b:0", {}, ["'b:0'", 0]),
        ("a:0.5,b:nan", {}, ["'b:nan'"]),
        ("a:1,", {}, ["''"]),
        ("a:1,b:2", {"aa": "all"}, ["data.members.aa", "a", "b"]),
    ],
)
def test_a_mixture_that_cannot_be_is_one_line(text, members, named):
    with refused("data.mixture", *named, lines=1):
        assemble.check(mixture(f"data.mixture={text}", **members))


def test_a_mixture_with_a_root_and_unknown_settings_are_refused():
    with refused("data.mixture='a:1'", "data.root='b'"):
        assemble.check(mixture("data.mixture=a:1", "data.root=b"))
    config = mixture("data.mixture=a:1")
    config.data.members = {"a": {"camera": "top"}}
    with refused("data.members.a.camera") as error:
        assemble.check(config)
    suggests(error, "cameras", ["state", "action", "fps", "stride", "ends"])


def test_a_missing_member_is_named(tmp_path):
    config = mixture(f"data.mixture={PUSHT}:1,{tmp_path / 'nowhere'}:1")
    with refused(f"data.root='{tmp_path / 'nowhere'}'", "data.mixture", "nowhere", "nowhere"):
        open_sources.make_source(config, "train")
