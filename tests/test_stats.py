"""Statistics of state and action: compared with the metadata of real datasets; normalisation."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recordings import refused
from shared_data import PUSHT, SHARED, needs_shared
from test_lerobot import write_v21

from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.stats import summarize
from wmjax.nn.normalize import normalizer

KEYS = (("state", "observation.state"), ("action", "action"))


def from_metadata(root):
    """Return lerobot's statistics; in v2.1, merge those of the episodes."""
    if (root / "meta/stats.json").is_file():
        return json.loads((root / "meta/stats.json").read_text())
    lines = (root / "meta/episodes_stats.jsonl").read_text().splitlines()
    episodes = [json.loads(line)["stats"] for line in lines]
    together = {}
    for _, key in KEYS:
        count, mean, std, low, high = (
            np.array([episode[key][name] for episode in episodes])
            for name in ("count", "mean", "std", "min", "max")
        )
        average = (count * mean).sum(0) / count.sum()
        variance = (count * (std**2 + (mean - average) ** 2)).sum(0) / count.sum()
        together[key] = {
            "count": [count.sum()],
            "mean": average,
            "std": variance**0.5,
            "min": low.min(0),
            "max": high.max(0),
        }
    return together


def check_against_metadata(root):
    (found,) = LeRobotSource(root, frames=1, fps=1).statistics()
    wanted = from_metadata(root)
    assert found["name"] == root.name
    for name, key in KEYS:
        assert found[name]["count"] == wanted[key]["count"][0]
        for what in ("mean", "std", "min", "max"):
            np.testing.assert_allclose(
                found[name][what], wanted[key][what], rtol=2e-5, atol=2e-5, err_msg=what
            )


def test_statistics_are_the_metadatas_over_the_same_episodes():
    check_against_metadata(PUSHT)


@needs_shared
@pytest.mark.parametrize(
    "name", ["g1_subset_v21", "g1_subset_v30", "aloha_sim_transfer_v3", "pusht_explore_v3"]
)
def test_statistics_are_the_metadatas_of_larger_datasets(name):
    check_against_metadata(SHARED / name)


def test_only_what_is_trained_on_counts():
    split = {"frames": 2, "fps": 10, "val_share": 0.4}
    source = LeRobotSource(PUSHT, **split)
    table = pq.read_table(PUSHT / "data/chunk-000/file-000.parquet")
    kept = np.isin(table["episode_index"].to_numpy(), [e.index for e in source.episodes])
    (found,) = source.statistics()
    wanted = summarize(np.array(table["action"].to_pylist(), np.float32)[kept])
    assert found["action"] == {name: pytest.approx(wanted[name], rel=1e-12) for name in wanted}
    assert found["action"]["count"] == 3 * 80


def test_episodes_too_short_for_a_clip_do_not_count(tmp_path):
    root = write_v21(tmp_path / "set", lengths=[20, 5, 12])  # the state is frame + 100 * episode
    (found,) = LeRobotSource(root, frames=10, fps=30).statistics()
    states = np.array([*range(20), *range(200, 212)], np.float32)
    assert found["state"] == summarize(states[:, None])
    (found,) = LeRobotSource(root, frames=10, fps=30, ends="repeat").statistics()
    assert found["state"]["count"] == 37


def test_values_normalised_by_their_dataset_have_mean_0_and_std_1():
    rng = np.random.default_rng(0)
    rows = [
        rng.normal(5, 3, (400, 3)).astype(np.float32),
        rng.normal(-2, 0.1, (300, 2)).astype(np.float32),
    ]
    rows[0][:, 1] = 7.25  # a joint that never moves
    affine = normalizer([{"state": summarize(r)} for r in rows], "state")
    for dataset, values in enumerate(rows):
        B, S = values.shape
        padded = np.zeros((B, 1, 3), np.float32)
        padded[:, 0, :S] = values
        ids = np.full(B, dataset, np.int32)
        normal = affine(padded, ids)
        np.testing.assert_allclose(normal.mean((0, 1)), 0, atol=1e-5)
        std = np.asarray(normal.std((0, 1)))
        np.testing.assert_allclose(std, [1, 0, 1] if dataset == 0 else [1, 1, 0], atol=1e-5)
        np.testing.assert_allclose(affine.undo(normal, ids), padded, atol=1e-5)


def test_a_normaliser_takes_rows_of_several_datasets_under_jit():
    statistics = [{"action": summarize(np.array([[z], [z + 2.0]]))} for z in (0.0, 10.0)]
    affine = normalizer(statistics, "action")
    values_BTPA = np.array([2.0, 10.0], np.float32).reshape(2, 1, 1, 1)
    normal = jax.jit(lambda *args: affine(*args))(values_BTPA, jnp.array([0, 1]))
    assert normal.shape == (2, 1, 1, 1)
    np.testing.assert_array_equal(normal.ravel(), [1, -1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_when_opened(tmp_path, value):
    root = shutil.copytree(PUSHT, tmp_path / "pusht")
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    actions = table["action"].to_pylist()
    actions[167][1] = value
    at = table.column_names.index("action")
    pq.write_table(table.set_column(at, "action", pa.array(actions)), path)
    with refused(str(path), "episode 2", "action[1]", str(value), "frame 7"):
        LeRobotSource(root, frames=2, fps=10)
