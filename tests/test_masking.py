"""Masks: exact budgets, no bias in time or space, and errors with the numbers."""

import numpy as np
import pytest

from wmjax.errors import UserError
from wmjax.masking import Budget, DoesNotFit, Masks
from wmjax.masking.multi_block import cover, multi_block

SHORT = {
    "strategy": "multi_block",
    "blocks": 8,
    "scale": 0.15,
    "aspect": (0.75, 1.5),
    "context": 63 / 256,
    "target": 124 / 256,
}
LONG = SHORT | {"blocks": 2, "scale": 0.7, "context": 16 / 256, "target": 176 / 256}
GRID = (8, 16, 16)
SMALL = {"a": {"strategy": "multi_block", "blocks": 2, "context": 0.5, "target": 0.2}}
DRAWS = 10_000


@pytest.fixture(scope="module")
def drawn():
    """Tally 10,000 draws by [mask, role]: tokens by tubelet, and tokens by draw and cell."""
    masks = Masks({"short": SHORT, "long": LONG}, GRID)
    rng = np.random.default_rng(0)
    tallies = np.zeros((2, 2, DRAWS, GRID[1] * GRID[2]), np.uint8)
    tubelets = np.zeros((2, 2, GRID[0]), np.int64)
    for i in range(DRAWS):
        for role, ids_of_masks in enumerate(masks.draw(rng)):
            for mask, ids_K in enumerate(ids_of_masks):
                tubelet, cell = np.divmod(ids_K, GRID[1] * GRID[2])
                tubelets[mask, role] += np.bincount(tubelet, minlength=GRID[0])
                tallies[mask, role, i] = np.bincount(cell, minlength=GRID[1] * GRID[2])
    return tubelets, tallies.reshape(2, 2, DRAWS, *GRID[1:])


def unevenness(tokens_by_tubelet_T):
    """Largest departure of a tubelet's share of the tokens from an even one."""
    return np.abs(tokens_by_tubelet_T / tokens_by_tubelet_T.mean() - 1).max()


def asymmetry(counts_DHW, axis):
    """Largest difference between a cell and its mirror image, in standard errors of n draws."""
    difference_DHW = counts_DHW.astype(np.int16) - np.flip(counts_DHW, axis).astype(np.int16)
    error_HW = difference_DHW.std(axis=0) / np.sqrt(len(counts_DHW))
    return np.max(np.abs(difference_DHW.mean(axis=0)) / np.maximum(error_HW, 1e-9))


@pytest.mark.parametrize(
    ("specs", "grid", "sizes"),
    [
        ({"short": SHORT, "long": LONG}, GRID, {"short": (504, 992), "long": (128, 1408)}),
        ({"short": SHORT, "long": LONG}, (8, 24, 24), {"short": (1136, 2232), "long": (288, 3168)}),
        ({"short": SHORT, "long": LONG}, (1, 8, 12), {"short": (24, 46), "long": (6, 66)}),
        (SMALL, (2, 4, 4), {"a": (16, 6)}),
        (SMALL, (4, 3, 5), {"a": (32, 12)}),
        (SMALL, (4, 5, 3), {"a": (32, 12)}),
    ],
)
def test_every_draw_has_the_exact_sizes_sorted_and_disjoint(specs, grid, sizes):
    masks = Masks(specs, grid)
    assert masks.sizes == sizes
    rng = np.random.default_rng(0)
    for _ in range(200):
        for context_K, target_M, size in zip(*masks.draw(rng), sizes.values(), strict=True):
            assert (context_K.size, target_M.size) == size
            assert context_K.dtype == target_M.dtype == np.int32
            for ids in (context_K, target_M):
                assert np.all(np.diff(ids) > 0)
                assert ids[0] >= 0
                assert ids[-1] < np.prod(grid)
            assert np.intersect1d(context_K, target_M).size == 0


def test_the_same_key_draws_the_same_masks():
    masks = Masks({"short": SHORT, "long": LONG}, GRID)

    def draw(*key):
        return np.concatenate(
            [ids for role in masks.draw(np.random.default_rng(key)) for ids in role]
        )

    assert np.array_equal(draw(1, 2, 3), draw(1, 2, 3))
    assert not np.array_equal(draw(1, 2, 3), draw(1, 3, 3))


def test_tubelets_are_seen_and_hidden_evenly(drawn):
    tubelets, _ = drawn
    for tokens_by_tubelet_T in tubelets.reshape(-1, GRID[0]):
        assert unevenness(tokens_by_tubelet_T) < 0.05


def test_cells_are_seen_and_hidden_symmetrically(drawn):
    _, counts = drawn
    for counts_DHW in counts.reshape(-1, *counts.shape[2:]):
        for axis in (1, 2):
            # 4 tallies x 2 axes x 128 pairs: chance passes 5 standard errors once in 1,700 seeds.
            assert asymmetry(counts_DHW, axis) < 5


def test_the_statistics_reject_the_truncation_of_the_reference():
    """Cutting the sorted ids to the shortest of a batch keeps the early tubelets."""
    rng = np.random.default_rng(0)
    context_T, target_T = np.zeros((2, GRID[0]), np.int64)
    rows_DHW = []
    for _ in range(100):
        pools = [np.broadcast_to(cover(GRID, rng, 8, 0.15, (0.75, 1.5)), GRID) for _ in range(24)]
        for tally_T, ids_of_pools in (
            (context_T, [np.flatnonzero(~pool) for pool in pools]),
            (target_T, [np.flatnonzero(pool) for pool in pools]),
        ):
            min_keep = min(ids.size for ids in ids_of_pools)
            for ids in ids_of_pools:
                kept = ids[:min_keep]
                tally_T += np.bincount(kept // 256, minlength=GRID[0])
                rows_DHW.append(np.bincount(kept % 256, minlength=256).reshape(GRID[1:]))
    assert unevenness(context_T) > 0.5
    assert unevenness(target_T) > 0.5
    assert asymmetry(np.stack(rows_DHW), 1) > 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strategy": "multiblock"}, ["mask.m.strategy='multiblock'", "mean 'multi_block'"]),
        ({"strategy": None}, ["mask.m.strategy=None"]),
        ({"block": 3}, ["mask.m.block: unknown option", "mean 'blocks'"]),
        ({"rng": 3}, ["mask.m.rng: unknown option"]),
        ({"context": 1.0}, ["mask.m.context=1.0", "between 0 and 1"]),
        ({"target": None}, ["mask.m.target=None", "between 0 and 1"]),
        ({"context": 0.001}, ["mask.m.context=0.001", "0 of the 16 x 16 cells"]),
        ({"blocks": 0}, ["mask.m.blocks=0"]),
        ({"scale": 1.5}, ["mask.m.scale=1.5"]),
        ({"aspect": (1.5, 0.75)}, ["mask.m.aspect=(1.5, 0.75)"]),
        (
            {"target": 0.8},
            ["mask.m: 504 context and 1640 target of 2048", "0 of 500 draws", "offer"],
        ),
    ],
)
def test_a_wrong_spec_is_named_with_its_numbers(change, words):
    with pytest.raises(UserError) as error:
        Masks({"m": SHORT | change}, GRID)
    for word in words:
        assert word in str(error.value)


def test_the_search_for_a_fitting_pool_ends():
    with pytest.raises(DoesNotFit, match="504 context and 2000 target tokens in 50 draws"):
        multi_block(GRID, Budget(504, 2000, max_draws=50), np.random.default_rng(0))
