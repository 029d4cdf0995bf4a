"""Masks: exact budgets, no bias in time or space, and errors with the numbers."""

from pathlib import Path

import micro
import numpy as np
import pytest
from says import refused, suggests

from wmjax import assemble
from wmjax.data.synthetic import SyntheticSource
from wmjax.masking import STRATEGIES, Budget, DoesNotFit, Masks, with_rounded_times
from wmjax.masking.blocks import cover, multi_block

SHORT = {
    "strategy": "multi_block",
    "blocks": 8,
    "scale": 0.15,
    "aspect": (0.75, 1.5),
    "context": 63 / 256,
    "target": 124 / 256,
}
LONG = SHORT | {"blocks": 2, "scale": 0.7, "context": 16 / 256, "target": 176 / 256}
OPTIONS = ("blocks", "scale", "time", "aspect", "cell")  # of multi_block
GRID = (8, 16, 16)
SMALL = {"a": {"strategy": "multi_block", "blocks": 2, "context": 0.5, "target": 0.2}}
DRAWS = 10_000

HALF = {"context": 0.25, "target": 0.5}
KINDS = {
    "multi_block": SHORT,
    "multi_block, time 0.5": SHORT | {"time": 0.5, "context": 0.4, "target": 0.15},
    "multi_block, cell 4": SHORT | {"cell": 4},
    "block": {"strategy": "block", "context": 0.3, "target": 0.3},
    "block, cell 2": {"strategy": "block", "time": 0.7, "cell": 2, "context": 0.3, "target": 0.3},
    "random": {"strategy": "random", **HALF},
    "random, cell 4": {"strategy": "random", "cell": 4, **HALF},
    "spatial": {"strategy": "spatial", **HALF},
    "spatial, cell 4": {"strategy": "spatial", "cell": 4, **HALF},
    "temporal": {"strategy": "temporal", **HALF},
    "temporal, 6 tubelets": {"strategy": "temporal", "tubelets": 6, **HALF},
    "temporal, run": {"strategy": "temporal", "place": "run", **HALF},
    "temporal, random": {"strategy": "temporal", "place": "random", **HALF},
}
EVEN = [kind for kind in KINDS if kind.startswith(("random", "spatial", "temporal, random"))]


def drawn_grids(kind, draws=1000, grid=GRID):
    """Draw one mask many times: bool_DTHW of its context, and of its target."""
    masks = Masks({kind: KINDS[kind]}, grid)
    out = np.zeros((2, draws, np.prod(grid)), bool)
    for i in range(draws):
        for role, (ids_K,) in enumerate(masks.draw(np.random.default_rng((7, i)))):
            out[role, i, ids_K] = True
    return out.reshape(2, draws, *grid)


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
        *(
            ({kind: spec}, GRID, {kind: (512, 1024)})
            for kind, spec in KINDS.items()
            if spec.items() >= HALF.items()
        ),
        *(({kind: KINDS[kind]}, GRID, {kind: (616, 616)}) for kind in ("block", "block, cell 2")),
        (
            {kind: KINDS[kind] for kind in ("random, cell 4", "spatial", "temporal", "block")},
            (6, 8, 12),
            {"random, cell 4": (144, 288), "spatial": (144, 288), "temporal": (144, 288)}
            | {"block": (174, 174)},
        ),
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


@pytest.mark.parametrize("specs", [{"short": SHORT, "long": LONG}, KINDS])
def test_the_same_key_draws_the_same_masks(specs):
    masks = Masks(specs, GRID)

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


@pytest.mark.parametrize("kind", EVEN)
def test_every_token_is_seen_and_hidden_with_the_same_chance(kind):
    draws = 1000
    for chosen_DTHW, share in zip(drawn_grids(kind, draws), (0.25, 0.5), strict=True):
        error = np.sqrt(share * (1 - share) / draws)
        # Chance passes 5.5 errors in one of 4e-8 x 2048 tokens x 2 roles: once in 6,000 seeds.
        assert np.abs(chosen_DTHW.mean(axis=0) - share).max() < 5.5 * error


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - EVEN))
def test_masks_have_no_side_of_the_frame_that_they_prefer(kind):
    for chosen_DTHW in drawn_grids(kind):
        assert asymmetry(chosen_DTHW.sum(axis=1), 1) < 5
        assert asymmetry(chosen_DTHW.sum(axis=1), 2) < 5
        if not kind.startswith("temporal") or "run" in kind:
            assert asymmetry(chosen_DTHW.sum(axis=2), 1) < 5  # no preferred time


def test_hidden_tubes_and_tubelets_hold_no_context():
    context_DTHW, target_DTHW = drawn_grids("spatial", draws=50)
    assert (target_DTHW == target_DTHW[:, :1]).all()
    for kind, hidden in {"spatial": 128, "spatial, cell 4": 128}.items():
        context_DTHW, target_DTHW = drawn_grids(kind, draws=50)
        tubes_DHW = target_DTHW.any(axis=1)
        assert not (context_DTHW.any(axis=1) & tubes_DHW).any()
        assert (tubes_DHW.sum(axis=(1, 2)) == hidden).all()
    for place, wanted in {"": [4, 5, 6, 7], ", 6 tubelets": [2, 3, 4, 5, 6, 7]}.items():
        context_DTHW, target_DTHW = drawn_grids(f"temporal{place}", draws=50)
        times_DT = target_DTHW.any(axis=(2, 3))
        assert (times_DT == np.isin(np.arange(8), wanted)).all()
        assert (context_DTHW.any(axis=(2, 3)) == ~times_DT).all()
    for place, longest_gap in {"run": 1, "random": 5}.items():
        times_DT = drawn_grids(f"temporal, {place}")[1].any(axis=(2, 3))
        assert (times_DT.sum(axis=1) == 4).all()
        assert max(np.diff(np.flatnonzero(times_T)).max() for times_T in times_DT) == longest_gap


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "cell" in kind])
def test_a_cell_is_hidden_whole(kind):
    cell = KINDS[kind]["cell"]
    for seen, hidden in zip(*drawn_grids(kind, draws=50), strict=True):
        for ids_THW in (seen, hidden):
            T, H, W = ids_THW.shape
            cells = ids_THW.reshape(T, H // cell, cell, W // cell, cell).any(axis=(2, 4))
            ids_THW |= cells.repeat(cell, axis=1).repeat(cell, axis=2)
        assert not (seen & hidden).any()


def test_a_page_of_pictures_shows_every_strategy():
    """Look at tests/output/masks.png: context grey, target red, neither dark."""
    pytest.importorskip("matplotlib", reason="pictures of the masks need matplotlib (extra: dev)")
    path = Path(__file__).parent / "output" / "masks.png"
    path.parent.mkdir(exist_ok=True)
    picture(KINDS | {"multi_block, long": LONG}).savefig(path)
    print(f"every masking strategy: {path}")
    assert path.stat().st_size > 100_000
    assert {spec["strategy"] for spec in KINDS.values()} == STRATEGIES.keys()


def picture(specs):
    """Draw one mask of every spec over the tubelets of a generated clip, a row a spec."""
    from matplotlib.figure import Figure

    patch = 8
    size = GRID[1] * patch
    source = SyntheticSource(
        frames=GRID[0], height=size, width=size, stride=2, seed=0, split="train"
    )
    grey_THW1 = np.stack(source[3]["frames_VT"][0]).max(axis=-1, keepdims=True) / 255
    context_THWC = np.repeat(0.5 + 0.5 * grey_THW1, 3, axis=-1)
    figure = Figure(figsize=(1.25 * GRID[0] + 2.2, 1.3 * len(specs) + 0.6), dpi=100)
    axes = figure.subplots(len(specs), GRID[0], squeeze=False)
    masks = Masks(specs, GRID)
    drawn = zip(*masks.draw(np.random.default_rng(1)), strict=True)
    for row, (name, ids, (K, M)) in enumerate(zip(specs, drawn, masks.sizes.values(), strict=True)):
        role_N = np.full(np.prod(GRID), 2)
        for role, ids_K in enumerate(ids):
            role_N[ids_K] = role
        role_THW1 = role_N.reshape(GRID).repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
        shown_THWC = np.where(role_THW1 == 0, context_THWC, context_THWC * (0.95, 0.25, 0.2))
        shown_THWC = np.where(role_THW1 == 2, 0.15 * context_THWC, shown_THWC)
        for axis, frame_HWC in zip(axes[row], shown_THWC, strict=True):
            axis.imshow(frame_HWC)
            axis.set(xticks=[], yticks=[])
        label = f"{name.replace(', ', chr(10))}\n{K} context\n{M} target"
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    for tubelet, axis in enumerate(axes[0]):
        axis.set_title(f"tubelet {tubelet}", fontsize=9)
    figure.suptitle("context: grey; target: red; neither: dark")
    figure.subplots_adjust(0.15, 0.01, 0.99, 0.95, 0.03, 0.06)
    return figure


def test_the_statistics_reject_the_truncation_of_the_reference():
    """Cutting the sorted ids to the shortest of a batch keeps the early tubelets."""
    rng = np.random.default_rng(0)
    context_T, target_T = np.zeros((2, GRID[0]), np.int64)
    rows_DHW = []
    for _ in range(100):
        pools = [cover(GRID, rng, 8, 0.15, 1.0, (0.75, 1.5)) for _ in range(24)]
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
    ("change", "named"),
    [
        ({"strategy": "multiblock"}, ["mask.m.strategy='multiblock'", *STRATEGIES]),
        ({"strategy": None}, ["mask.m.strategy=None", *STRATEGIES]),
        ({"block": 3}, ["mask.m.block", "multi_block", *OPTIONS]),
        ({"rng": 3}, ["mask.m.rng", "multi_block", *OPTIONS]),
        ({"context": 1.0}, ["mask.m.context=1.0", 0, 1]),
        ({"target": None}, ["mask.m.target=None", 0, 1]),
        ({"context": 0.001}, ["mask.m.context=0.001", 0, 16, 16, "0.003906"]),
        ({"blocks": 0}, ["mask.m.blocks=0", 1]),
        ({"scale": 1.5}, ["mask.m.scale=1.5", 0, 1]),
        ({"aspect": (1.5, 0.75)}, ["mask.m.aspect=(1.5, 0.75)", 0]),
        ({"time": 0}, ["mask.m.time=0", 1]),
        ({"cell": 3}, ["mask.m.cell=3", 16, 16]),
        ({"target": 0.8}, ["mask.m", 504, 1640, 2048, 0, 500, 760, 1288, "multi_block"]),
    ],
)
def test_a_wrong_spec_is_named_with_its_numbers(change, named):
    with refused(*named):
        Masks({"m": SHORT | change}, GRID)


@pytest.mark.parametrize(
    ("change", "nearest", "choices"),
    [
        ({"strategy": "multiblock"}, "multi_block", STRATEGIES),
        ({"block": 3}, "blocks", OPTIONS),
    ],
)
def test_the_nearest_strategy_or_option_is_proposed(change, nearest, choices):
    with refused() as error:
        Masks({"m": SHORT | change}, GRID)
    suggests(error, nearest, set(choices) - {nearest})


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("random", {"context": 0.6}, [1232, 1024, 2048, 0, 500, 1024, 1024, "random"]),
        (
            "spatial, cell 4",
            {"target": 0.52, "context": 0.47},
            [960, 1064, 2048, 0, 500, 896, 1152, "spatial"],
        ),
        (
            "temporal",
            {"target": 0.9, "context": 0.1},
            [208, 1840, 2048, 0, 500, 0, 2048, "temporal"],
        ),
        ("temporal", {"tubelets": 3}, [512, 1024, 2048, 0, 500, 1280, 768, "temporal"]),
        ("temporal", {"tubelets": 8}, ["mask.m.tubelets=8", 0, 7]),
        ("temporal", {"place": "past"}, ["mask.m.place='past'", "future", "run", "random"]),
        ("temporal", {"cell": 2}, ["mask.m.cell", "temporal", "place", "tubelets"]),
        ("block", {"target": 0.5}, [616, 1024, 2048, 0, 500, 1328, 720, "block"]),
    ],
)
def test_every_strategy_refuses_what_it_cannot_hold(kind, change, named):
    with refused("mask.m", *named):
        Masks({"m": KINDS[kind] | change}, GRID)


def test_no_mask_at_all_is_refused_by_a_model_that_needs_one():
    config = micro.config()
    config.mask = {}
    with refused("mask", "model.name='vjepa2'", "strategy"):
        assemble.make_masks(config)


def test_without_masks_nothing_is_drawn():
    masks = Masks({}, GRID)
    assert masks.sizes == {}
    assert masks.draw(np.random.default_rng(0)) == ((), ())


def test_the_search_for_a_fitting_pool_ends():
    with refused(504, 2000, error=DoesNotFit):
        multi_block(GRID, Budget(504, 2000, max_draws=50), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("tubelets", "time", "length", "before"),
    [
        (8, 0.5, 4, 4),
        (5, 0.5, 2, 2),
        (7, 0.5, 3, 4),
        (8, 0.7, 5, 6),
        (8, 0.05, 1, 1),
        (3, 1.0, 3, 3),
    ],
)
def test_the_length_of_a_block_is_rounded_down_as_in_the_reference(tubelets, time, length, before):
    """max(1, int(T * time)), as vjepa2 src/masks/multiseq_multiblock3d.py; before: round."""
    grid = (tubelets, 8, 8)
    old = with_rounded_times({"m": {"strategy": "block", "time": time}}, grid)["m"]["time"]
    for share, wanted in ((time, length), (old, before)):
        covered_THW = cover(grid, np.random.default_rng(0), 1, 0.3, share, (0.75, 1.5))
        assert covered_THW.any(axis=(1, 2)).sum() == wanted


def test_the_default_length_of_a_block_is_rounded_too_before_rules_2():
    specs = {"m": {"strategy": "block"}, "n": {"strategy": "random"}}
    assert with_rounded_times(specs, (7, 4, 4)) == {
        "m": {"strategy": "block", "time": 4.5 / 7},
        "n": {"strategy": "random"},
    }
