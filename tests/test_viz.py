"""The numbers behind the pictures, and that each way to the pictures ends in ones that open."""

import base64
import dataclasses
import itertools
import json
import re
import shutil
import sys
import types

import av
import jax
import micro
import numpy as np
import pytest
from says import lines_with, refused, says

import wmjax
from wmjax import open_sources
from wmjax.commands import demo
from wmjax.evals import Context, Unavailable
from wmjax.masking import Masks
from wmjax.run.reporter import Reporter
from wmjax.types import WorldModelInput
from wmjax.viz import __main__ as door
from wmjax.viz import curves, draw, features, frames, page
from wmjax.viz.look import Hidden, Look, look
from wmjax.viz.validation import Looker, Pictures, pictures
from wmjax.viz.video import write_mp4

GRID = (3, 4, 5)
NOTHING = {  # states and actions that are not looked at
    "state": np.zeros((4, 6), np.float32),
    "state_mask": np.zeros((4, 6), bool),
    "action": np.zeros((4, 1, 6), np.float32),
    "action_mask": np.zeros((4, 1, 6), bool),
}
MASKS = Masks(
    {
        "few": {"strategy": "random", "context": 0.25, "target": 0.5},
        "most": {"strategy": "random", "context": 0.1, "target": 0.8},
    },
    GRID,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def seen():
    """A look at two clips, by a model that predicts the tokens of its first mask right."""
    (few, most), (few_target, most_target) = MASKS.draw(np.random.default_rng(0))
    video = np.random.default_rng(1).integers(0, 256, (2, 6, 32, 40, 3), np.uint8)
    target = normal(2, 60, 8)
    hidden = {
        "few": Hidden(few, few_target, *[target[0, few_target]] * 2),
        "most": Hidden(most, most_target, target[0, most_target] + 0.5, target[0, most_target]),
    }
    return Look(video, target, GRID, hidden, ["clip 7", "clip 9"])


def test_the_basis_finds_the_axes_of_largest_variance_whatever_the_order():
    tokens = normal(4000, 6) * np.array([0.1, 9, 0.1, 1, 3, 0.1], np.float32) + 5
    basis = features.fit_basis(tokens)
    assert np.abs(basis.components_D3).argmax(axis=0).tolist() == [1, 4, 3]
    assert (basis.components_D3.max(axis=0) > 0.99).all()
    again = features.fit_basis(tokens[::-1])
    np.testing.assert_allclose(again.components_D3, basis.components_D3, atol=1e-5)


def test_one_basis_gives_equal_features_equal_colours_in_every_frame_and_prediction(seen):
    basis = features.fit_basis(seen.target_BND)
    whole = features.colours(basis(seen.target_BND[0]))
    for t in range(GRID[0]):
        one = features.colours(basis(seen.target_BND[0, 20 * t : 20 * (t + 1)]))
        np.testing.assert_array_equal(one, whole[20 * t : 20 * (t + 1)])
    exact = seen.hidden["few"]
    assert len(np.unique(whole, axis=0)) > 40
    np.testing.assert_array_equal(
        features.colours(basis(exact.prediction_MD)), whole[exact.target_ids_M]
    )


def test_a_larger_first_component_is_lighter_and_the_middle_is_grey():
    steps = np.stack([np.linspace(-1, 1, 9), np.zeros(9), np.zeros(9)], axis=-1)
    rgb = features.colours(steps).astype(int)
    assert (np.diff(rgb.sum(axis=-1)) > 0).all()
    assert (np.ptp(rgb, axis=-1) <= 2).all()
    blue, yellow = features.colours(np.array([(0, -1, 0), (0, 1, 0)])).astype(int)
    assert blue[2] > blue[0]
    assert yellow[2] < yellow[0]


def test_a_token_is_most_like_itself_and_its_copy():
    tokens = normal(30, 16)
    tokens[17] = tokens[4]
    cosine = features.similarity(tokens, 4, tokens.mean(axis=0))
    assert set(np.argsort(cosine)[-2:]) == {4, 17}
    np.testing.assert_allclose(cosine[[4, 17]], 1, rtol=1e-5)
    assert (np.abs(np.delete(cosine, [4, 17])) < 0.95).all()


def test_retrieval_finds_the_same_frame_in_another_clip():
    clips = normal(5, 60, 16)
    clips += 10 * normal(60, 16, seed=1)  # what says where, and nothing of what is there
    clips[3].reshape(3, 20, 16)[2] = clips[1].reshape(3, 20, 16)[2] + 0.01
    of_frames = features.frame_features(clips, GRID)
    assert of_frames.shape == (5, 3, 16)
    found = features.nearest_frames(of_frames, 1, 2, 9)
    assert found[0][:2] == (3, 2)
    assert found[0][2] > 0.99 > found[1][2]
    assert sorted(clip for clip, _, _ in found) == [0, 2, 3, 4]


def test_the_error_is_zero_where_the_prediction_is_right_and_nowhere_else_is_there_one(seen):
    right, off = draw.error_maps(seen).values()
    for error_THW, name in ((right, "few"), (off, "most")):
        there = np.zeros(GRID, bool)
        there.ravel()[seen.hidden[name].target_ids_M] = True
        np.testing.assert_array_equal(~np.isnan(error_THW), there)
    assert (right[~np.isnan(right)] == 0).all()
    np.testing.assert_allclose(off[~np.isnan(off)], 0.5, rtol=1e-5)


@pytest.mark.parametrize("name", ["few", "most"])
def test_as_many_tokens_are_painted_as_the_mask_has(seen, name):
    hidden = seen.hidden[name]
    roles = frames.roles(hidden.context_ids_K, hidden.target_ids_M, GRID)
    K, M = MASKS.sizes[name]
    assert np.bincount(roles.ravel()).tolist() == [60 - K - M, K, M]
    grey = np.full((6, 32, 40, 3), 128, np.uint8)
    painted, counts = np.unique(
        frames.paint_roles(grey, roles).reshape(-1, 3), axis=0, return_counts=True
    )
    pixels = 2 * 8 * 8  # of a token, in both of its frames
    bluer = np.sign(painted[:, 2].astype(int) - painted[:, 0])
    assert dict(zip(bluer.tolist(), counts.tolist(), strict=True)) == {
        0: pixels * (60 - K - M),
        1: pixels * K,
        -1: pixels * M,
    }
    shown = frames.show_context(grey, roles)
    assert (shown == 128).all(axis=-1).sum() == pixels * K


def test_the_busiest_token_is_where_something_moves():
    video = np.full((6, 32, 40, 3), 90, np.uint8)
    video[3, 9:14, 25:30] = 255
    assert frames.busiest(video, GRID) == 20 + 1 * 5 + 3


def test_reports_are_read_as_series_and_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / curves.METRICS
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2}\n{"step": 3, "loss": 0.25}\n{"st')
    steps, values = curves.series(curves.read(tmp_path), "loss")
    assert (steps.tolist(), values.tolist()) == ([1, 3], [0.5, 0.25])
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    assert curves.read(tmp_path) == [{"step": 1}, {"step": 3}]


def test_runs_in_one_figure_are_told_apart_without_colour_too():
    run = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    figure = draw.reports({f"run {i}": run for i in range(8)})
    looks = [(line.get_color(), line.get_marker()) for line in figure.legends[0].get_lines()]
    assert len(set(looks)) == 8
    assert all(mine[1] != next_one[1] for mine, next_one in itertools.pairwise(looks))


@pytest.mark.parametrize("runs", [1, 2])
def test_a_legend_names_the_lines_that_are_drawn_as_they_look(runs):
    run = [{"step": step, "loss": 1 / step, "health/target_std": 1.0} for step in (1, 2, 3)]
    run[2]["validation/loss"] = 0.5
    figure = draw.reports({f"run {i}": run for i in range(runs)})
    loss, spread = figure.axes[:2]
    named = {
        text.get_text(): (line.get_linestyle(), line.get_fillstyle())
        for axis in (loss, spread)
        for text, line in zip(
            axis.get_legend().get_texts(), axis.get_legend().get_lines(), strict=True
        )
    }
    drawn = [(line.get_linestyle(), line.get_fillstyle()) for line in loss.get_lines()]
    assert [named["training"], named["validation"]] * runs == drawn
    assert named.keys() == {"training", "validation", "target"}


def test_the_probe_is_drawn_as_bars():
    row = {f"probe/{label}/{kind}": 0.5 for label in "ab" for kind in ("trained", "random")}
    (axis,) = draw.probe(row | {"probe/a/trained": -0.25}).axes
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    assert heights[:2] == [[-0.25, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("tubelets", [2, 3, 4])
def test_no_label_is_cut_off(seen, tubelets):
    video = seen.video_BTHWC[:, np.arange(2 * tubelets) % 6]
    target = normal(2, 20 * tubelets, 8)
    mask = Hidden(np.arange(5), np.arange(5, 15), target[0, 5:15] + 0.5, target[0, 5:15])
    look = Look(video, target, (tubelets, 4, 5), {"a_long_name": mask}, seen.names)
    for figure in (draw.similarity(look, 7), draw.errors(look), draw.masks(look)):
        rgb = draw.pixels(figure)
        edges = (rgb[:2], rgb[-2:], rgb[:, :2], rgb[:, -2:])
        assert min(edge.min() for edge in edges) > 200


def test_a_video_has_all_frames_in_h264_and_even_sizes(tmp_path):
    video = np.zeros((5, 33, 41, 3), np.uint8)
    video[2:] = 200
    write_mp4(tmp_path / "v.mp4", video, 4.0)
    with av.open(str(tmp_path / "v.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 4)
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert np.shape(decoded) == (5, 34, 42, 3)
    assert [round(frame.mean(), -1) for frame in decoded] == [0, 0, 200, 200, 200]


def inlined(html):
    """Check that nothing is loaded from elsewhere; return the files that the page holds."""
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|<script""", html)
    found = re.findall(r'src="data:([a-z]+/[a-z0-9]+);base64,([^"]+)"', html)
    return [(kind, base64.b64decode(data)) for kind, data in found]


def test_a_page_holds_its_pictures_and_escapes_its_texts(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    section = page.Section("<b>", "a & b", tmp_path / "a.png")
    said = "verdict: a < b\n  one\n  two"
    page.write(tmp_path / "x.html", "t<", [("k", "<v>")], [section], said)
    html = (tmp_path / "x.html").read_text()
    assert inlined(html) == [("image/png", b"picture")]
    assert "<b>" not in html
    assert "a &amp; b" in html
    assert "verdict: a &lt; b" in html
    assert html.count("<li>") == 2


def test_weights_without_a_predictor_are_drawn_without_predictions(seen, tmp_path):
    hidden = {name: h._replace(prediction_MD=None) for name, h in seen.hidden.items()}
    seen.hidden = hidden
    files = [section.file.name for section in door.write_pictures(seen, None, tmp_path)]
    assert files == [
        *("masks.png", "features.png", "similarity.png", "retrieval.png"),
        *("clip_few.mp4", "clip_most.mp4"),
    ]


def test_the_door_draws_a_run_and_the_curves_of_several(micro_run, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(micro_run / curves.METRICS, other)
    out = tmp_path / "out"
    flags = [f"--out={out}", "--clips=3", "--config.data.val_share=0.2"]
    assert door.run([str(micro_run), str(other), *flags]) == 0
    said = capsys.readouterr().out
    assert len(lines_with(said, "data.val_share", 0.05, 0.2)) == 1
    html = (out / "index.html").read_text()
    files = {path.read_bytes() for path in out.iterdir() if path.suffix != ".html"}
    assert len(files) == 8
    assert {data for _, data in inlined(html)} == files
    assert str(out / "index.html") in said
    assert lines_with(html, micro_run, other)
    with refused(tmp_path / "none" / curves.METRICS):
        door.run([str(micro_run), str(tmp_path / "none")])


def test_pictures_at_validation_are_of_what_a_loaded_model_sees(micro_run):
    model = wmjax.load(micro_run)
    masks = Masks(micro.config().mask.to_dict(), (2, 4, 4))
    video = np.random.default_rng(0).integers(0, 256, (5, 2, 4, 32, 32, 3), np.uint8)
    drawn = [masks.draw(np.random.default_rng(i)) for i in range(5)]
    there = np.array([[False, True]] * 5)
    clips = [
        {"video": video[i], "view_mask": there[i], "sample_id": i, "dataset_id": 0, **NOTHING}
        | {f"context_{j}": ids for j, ids in enumerate(context)}
        | {f"target_{j}": ids for j, ids in enumerate(target)}
        for i, (context, target) in enumerate(drawn)
    ]
    arrays = {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}
    batch = WorldModelInput.of(arrays, list(masks.sizes))
    source = open_sources.make_generator(micro.config(), "train", views=2)
    steps = micro.prepare(micro.config(), sources={"train": source}).steps
    state = dataclasses.replace(steps.init(), params=model.params, target=model.params["encoder"])
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, steps.abstract))
    found = Looker(steps, masks.grid)(state, batch)
    wanted = look(model, clips[:4], masks)
    assert found.names == wanted.names
    np.testing.assert_array_equal(found.video_BTHWC, wanted.video_BTHWC)
    np.testing.assert_allclose(found.target_BND, wanted.target_BND, atol=1e-4)
    assert found.hidden.keys() == wanted.hidden.keys()
    for name, hidden in found.hidden.items():
        for ours, theirs in zip(hidden, wanted.hidden[name], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_model_that_has_diverged_is_not_drawn_and_stops_no_training(seen):
    assert pictures(seen).keys() == {"few", "most"}
    seen.hidden["most"].prediction_MD[3, 2] = np.nan
    assert pictures(seen) == {}


def test_the_demo_of_a_model_that_has_diverged_ends_in_a_line(seen, tmp_path, monkeypatch):
    seen.target_BND[0, 0, 0] = np.nan
    monkeypatch.setattr(demo, "show_model", lambda *_: types.SimpleNamespace(params={}, target={}))
    monkeypatch.setattr(Looker, "__call__", lambda *_: seen)
    with refused(tmp_path, "features", "--workdir"):
        demo.demo(micro.config(), tmp_path, mesh=micro.mesh(micro.config()))


def test_wandb_is_handed_the_pictures_that_can_be_drawn(tmp_path, monkeypatch, capsys):
    logged = []
    run = types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row)), finish=lambda: None
    )
    fake = types.SimpleNamespace(init=lambda **_: run, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = micro.config("log.wandb=True").log
    reporter = Reporter(
        tmp_path, num_steps=1, start=0, config={}, alarms=lambda step, row: [], **settings
    )
    with reporter:
        assert reporter.draws
        reporter.show(3, lambda: {"short": np.zeros((4, 5, 3), np.uint8)})
        reporter.show(4, lambda: {"short": 1 / 0})
    assert logged == [(3, {"validation/short": (4, 5, 3)})]
    says(capsys.readouterr().out, "warning", 4, "division by zero", lines=1)


def test_without_matplotlib_one_line_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused("matplotlib", "pip install -e '.[viz]'", "uv run --extra viz"):
        door.run([str(tmp_path)])
    keep = demo.keeper(tmp_path / "demo")
    keep("x", lambda: pytest.fail("drawn"))
    says(capsys.readouterr().out, "matplotlib", ".[viz]")
    assert not (tmp_path / "demo").exists()
    with pytest.raises(Unavailable) as reason:  # training goes on without
        Pictures(Context(None, {}, None, {}, tmp_path, None, shows=True))
    says(reason, "matplotlib", ".[viz]", lines=3)


def test_the_demo_shows_every_component_and_saves_nothing_else(tmp_path, capsys):
    assert demo.demo(micro.config(), tmp_path, mesh=micro.mesh(micro.config())) == 0
    said = capsys.readouterr().out
    titles = [line for line in said.splitlines() if re.match(r"\d\. ", line)]
    parts = ("configuration", "batch", "masks", "forward", "loss", "step")
    for number, (title, part) in enumerate(zip(titles, parts, strict=True), start=1):
        says(title, f"{number}.", part)
    assert lines_with(said, "video_BVTHWC", "uint8", "(8, 1, 4, 32, 32, 3)")
    assert lines_with(said, "long", 2, 22)
    assert lines_with(said, "predictor", "(8, 22, 48)", "(8, 16, 48)")
    pictures = sorted(path.name for path in (tmp_path / "demo").iterdir())
    assert pictures == ["batch.png", "error.png", "features.png", "masks.png"]
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_weights_clip_and_the_dataset_decide_what_is_looked_at():
    of_weights = {
        "model": {"patch": 14, "tubelet": 2, "width": 64, "rope": "tiled"},
        "classifier": {},
        "clip": {"frames": 8, "size": 224},
    }
    weights = types.SimpleNamespace(config=of_weights)
    config = door.configuration(weights, None, ["data.fps=10"])
    assert (config.data.source, config.data.frames, config.data.image_size) == ("synthetic", 8, 224)
    assert (config.model.patch, config.data.fps) == (14, 10.0)
    of_run = json.loads(json.dumps(micro.config("data.fps=5").to_dict()))
    of_run["mask"] = {"only": of_run["mask"]["short"]}
    run = types.SimpleNamespace(config=of_run)
    config = door.configuration(run, "some/where", [])
    assert (config.data.source, config.data.root, config.data.fps) == ("lerobot", "some/where", 5)
    assert list(config.mask) == ["only"]
    assert config.data.crop_scale == (1.0, 1.0)
