"""Draws figures of what the other files compute. Matplotlib is imported when drawing starts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wmjax.errors import UserError, how_to_install
from wmjax.evals import verdict
from wmjax.viz import curves, features, frames
from wmjax.viz.acting import Acted
from wmjax.viz.features import Basis
from wmjax.viz.look import Hidden, Look

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 8  # most tubelets that a figure shows, evenly spaced
_STRIP = 26  # height in pixels of a caption in a video
_PICTURE = 128  # width in pixels to which small frames are enlarged
_HEAT = "cividis"  # its values differ in lightness, so that colour vision is not needed
_DPI = 110
_SAVED_DPI = 160  # higher, because a page enlarges most figures
# Colours of runs, from Okabe and Ito's palette; the easiest to tell apart for red-green
# colour-blind people come first. The number of marks differs from that of colours, so that runs
# with the same colour get different marks.
_LINES = ("#0072B2", "#E69F00", "#000000", "#009E73", "#56B4E9", "#D55E00", "#CC79A7")
_MARKS = "osD^v"
_STYLES = (("-", "full"), ("--", "none"))  # of the series in a panel: line style, fill of marks

Row = tuple[str, Sequence[np.ndarray]]  # label of a row, and its pictures


def need() -> None:
    """Raise UserError, which names the extra, unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            f"pictures need matplotlib, which is not installed: {how_to_install('viz')}"
        ) from None


def masks(look: Look) -> "Figure":
    """Draw context and target tokens, one row a mask."""
    shown = _shown(look)
    video = look.video_BTHWC[0]
    rows: list[Row] = [("frames", video[shown * look.tubelet])]
    for name, hidden in look.hidden.items():
        K, M = len(hidden.context_ids_K), len(hidden.target_ids_M)
        painted = frames.paint_roles(video, _roles(look, hidden))
        rows.append((f"{name}\n{K} context\n{M} target", painted[shown * look.tubelet]))
    figure = _table(rows, _tubelets(look))
    _legend(figure, {"context": frames.CONTEXT, "target": frames.TARGET, "neither": frames.NEITHER})
    return figure


def clips(look: Look) -> "Figure":
    """Draw the frames, one row a clip."""
    frames_T = _shown(look) * look.tubelet
    rows = [(n, v[frames_T]) for n, v in zip(look.names, look.video_BTHWC, strict=True)]
    return _table(rows, _tubelets(look))


def components(look: Look, basis: Basis) -> "Figure":
    """Draw target and predicted features, with principal components as colours."""
    shown = _shown(look)
    video = look.video_BTHWC[0]
    rows: list[Row] = [
        ("frames", video[shown * look.tubelet]),
        ("target", target_colours(look, basis)[shown]),
    ]
    for name, hidden in look.hidden.items():
        if hidden.prediction_MD is not None:
            painted = prediction_colours(look, hidden, basis)
            rows.append((f"prediction\n{name}", painted[shown * look.tubelet]))
    return _table(rows, _tubelets(look))


def errors(look: Look) -> "Figure":
    """Draw the error of each loss term at its predicted tokens; frames in grey elsewhere."""
    shown = _shown(look)
    found = error_maps(look)
    top = max(float(np.nanmax(error_THW)) for error_THW in found.values())
    video = look.video_BTHWC[0]
    rows: list[Row] = [("frames", video[shown * look.tubelet])]
    for name, error_THW in found.items():
        painted = paint_error(video, error_THW, top)
        label = f"{name}\nmean {np.nanmean(error_THW):.2f}"
        rows.append((label, painted[shown * look.tubelet]))
    return _table(rows, _tubelets(look), bar=(0.0, top, "mean |prediction - target|"))


def similarity(look: Look, token: int) -> "Figure":
    """Draw the cosine between one token, which is outlined, and all tokens of its clip."""
    shown = _shown(look)
    mean_D = look.target_BND.reshape(-1, look.target_BND.shape[-1]).mean(axis=0)
    cosine_THW = features.similarity(look.target_BND[0], token, mean_D).reshape(look.grid)
    low = min(0.0, float(cosine_THW.min()))
    video = look.video_BTHWC[0]
    maps = frames.spread(heat(cosine_THW, low, 1.0), video)
    rows: list[Row] = [
        (name, frames.outline(pictures, token, look.grid)[shown * look.tubelet])
        for name, pictures in (("frames", video), ("similarity", maps))
    ]
    return _table(rows, _tubelets(look), bar=(low, 1.0, "cosine"))


def retrieval(look: Look, queries: int = 4, found: int = 5) -> "Figure":
    """Draw frames of the first `queries` clips, each beside the `found` most similar frames.

    Each other clip contributes at most one frame.
    """
    t = look.grid[0] // 2
    of_frames = features.frame_features(look.target_BND, look.grid)
    rows: list[list[tuple[str, np.ndarray]]] = []
    for clip in range(min(queries, len(of_frames))):
        frame = t * look.tubelet
        label = f"query: {look.names[clip]}\nframe {frame}"
        row = [(label, look.video_BTHWC[clip, frame])]
        for other, at, cosine in features.nearest_frames(of_frames, clip, t, found):
            frame = at * look.tubelet
            label = f"{look.names[other]}\nframe {frame}, cosine {cosine:.2f}"
            row.append((label, look.video_BTHWC[other, frame]))
        rows.append(row)
    height, width = look.video_BTHWC.shape[2:4]
    figure = _figure(1.5 * len(rows[0]), (1.4 * height / width + 0.4) * len(rows))
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for y, row in enumerate(rows):
        for x, (label, picture) in enumerate(row):
            _picture(axes[y, x], picture)
            axes[y, x].set_title(label, fontsize=8)
    return figure


def energies(acted: Acted) -> "Figure":
    """Draw the energy landscape of one block, with the recorded action."""
    figure = _figure(5.2, 4.2)
    axis = figure.subplots()
    image = axis.pcolormesh(acted.x_X, acted.y_Y, acted.energy_YX, cmap=_HEAT, shading="nearest")
    axis.plot(*acted.taken, "o", color="white", markeredgecolor="black", label="recorded")
    row, column = np.unravel_index(acted.energy_YX.argmin(), acted.energy_YX.shape)
    best = acted.x_X[column], acted.y_Y[row]
    axis.plot(*best, "s", color="white", markeredgecolor="black", label="lowest")
    axis.set(xlabel=f"action[{acted.numbers[0]}]", ylabel=f"action[{acted.numbers[1]}]")
    axis.legend(fontsize=8)
    figure.colorbar(image, ax=axis, label="distance to the next frame")
    return figure


def rollouts(acted: Acted) -> "Figure":
    """Draw recorded frames, and below them the frames that are nearest to what is imagined."""
    rows: list[Row] = []
    for number, (true, nearest) in enumerate(zip(acted.true_CT, acted.nearest_CT, strict=True)):
        shown = np.linspace(0, len(true) - 1, min(len(true), _COLUMNS)).round().astype(int)
        rows.append((f"clip {number}\nrecorded", [true[t] for t in shown]))
        rows.append(("imagined", [nearest[t] for t in shown]))
    return _table(rows, [f"{t}" for t in shown])


def reports(runs: Mapping[str, curves.Run]) -> "Figure":
    """Draw loss and health of runs over their steps; each run has a colour and a mark."""
    panels = {
        title: lines
        for title, lines in curves.PANELS.items()
        if any(len(curves.series(run, key)[0]) for run in runs.values() for key in lines.values())
    }
    deep = -(-len(panels) // 2)
    figure = _figure(9, 2.5 * deep + 0.3 * len(runs))
    from matplotlib.lines import Line2D

    axes = figure.subplots(deep, 2, squeeze=False, sharex=True).ravel()
    looks = _line_looks(len(runs))
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        drawn: dict[str, dict[str, Any]] = {}  # lines of this panel: how they look in every run
        for i, (look, run) in enumerate(zip(looks, runs.values(), strict=True)):
            for name, (style, fill) in zip(lines, _STYLES, strict=False):
                steps, values = curves.series(run, lines[name])
                if not len(steps):
                    continue
                drawn[name] = {"linestyle": style, "fillstyle": fill}
                every = max(1, len(steps) // 10)
                at = every * i // len(runs), every  # marks stay visible where lines coincide
                axis.plot(steps, values, style, **look, fillstyle=fill, markevery=at)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.ticklabel_format(axis="y", scilimits=(-3, 5))
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            # Grey where runs have colours of their own.
            own = looks[0] if len(runs) == 1 else {"color": "grey", "marker": "o", "markersize": 4}
            handles = [Line2D([], [], **own, **style) for style in drawn.values()]
            axis.legend(handles, drawn, fontsize=8, handlelength=3)
    for axis in axes[len(panels) :]:
        axis.remove()
    handles = [Line2D([], [], **look) for look in looks]
    figure.legend(handles, list(runs), loc="outside upper center", fontsize=9)
    return figure


def probe(row: Mapping[str, float]) -> "Figure":
    """Draw R2 of the linear probe as bars: a group for each label, a bar for each kind of features.

    row: figures as in metrics.jsonl, probe/LABEL/KIND.
    """
    labels = verdict.labels(row)
    figure = _figure(max(5.0, 2.5 * len(labels)), 3.2)
    axis = figure.subplots()
    kinds = {"trained": "trained features", "random": "random weights", "pixels": "pixels"}
    for i, (kind, name) in enumerate(kinds.items()):
        values = [row.get(f"probe/{label}/{kind}", np.nan) for label in labels]
        bars = axis.bar(np.arange(len(labels)) + 0.27 * (i - 1), values, 0.25, color=_LINES[i])
        bars.set_label(name)
        axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_xticks(range(len(labels)), labels, fontsize=9)
    axis.set_ylabel("R2 on held-out clips (1: best)", fontsize=9)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.margins(y=0.15)
    figure.legend(loc="outside upper center", ncols=len(kinds), fontsize=9)
    return figure


def overview(look: Look, basis: Basis) -> dict[str, "Figure"]:
    """Draw one figure a loss term, for training: frames, mask, target, prediction, error."""
    shown = _shown(look)
    video = look.video_BTHWC[0]
    found = error_maps(look)
    figures = {}
    for name, hidden in look.hidden.items():
        top = float(np.nanmax(found[name]))
        rows: list[Row] = [
            ("frames", video[shown * look.tubelet]),
            ("mask", frames.paint_roles(video, _roles(look, hidden))[shown * look.tubelet]),
            ("target", target_colours(look, basis)[shown]),
            ("prediction", prediction_colours(look, hidden, basis)[shown * look.tubelet]),
            ("error", paint_error(video, found[name], top)[shown * look.tubelet]),
        ]
        figures[name] = _table(rows, _tubelets(look), bar=(0.0, top, "error"))
    return figures


def panels(look: Look, name: str, basis: Basis) -> np.ndarray:
    """Return a video of the shown clip in captioned tiles, uint8 THWC.

    Six tiles: frames, mask, context, target, prediction, error. Four without a prediction.
    """
    video, hidden = look.video_BTHWC[0], look.hidden[name]
    of_mask = _roles(look, hidden)
    pictures = {
        "frames": video,
        f"mask {name}": frames.paint_roles(video, of_mask),
        "context (encoder input)": frames.show_context(video, of_mask),
        "target, PCA": frames.spread(target_colours(look, basis), video),
    }
    if hidden.prediction_MD is not None:
        error_THW = error_maps(look)[name]
        pictures["prediction, PCA"] = prediction_colours(look, hidden, basis)
        pictures["error (bright: large)"] = paint_error(
            video, error_THW, float(np.nanmax(error_THW))
        )
    times = max(1, round(240 / video.shape[1]))
    tiles = []
    for caption, picture in pictures.items():
        large = picture.repeat(times, axis=1).repeat(times, axis=2)
        strip_HWC = _caption(caption, large.shape[2])
        strip = np.broadcast_to(strip_HWC, (len(large), *strip_HWC.shape))
        tile = np.concatenate([strip, large], axis=1)
        tiles.append(np.pad(tile, [(0, 0), (0, 4), (2, 2), (0, 0)], constant_values=255))
    across = len(tiles) // 2
    rows = [np.concatenate(tiles[i : i + across], axis=2) for i in (0, across)]
    return np.concatenate(rows, axis=1)


def target_colours(look: Look, basis: Basis) -> np.ndarray:
    """Return the PCA colours of the target's features, one a token: uint8 THWC."""
    return features.colours(basis(look.target_BND[0])).reshape(*look.grid, 3)


def prediction_colours(look: Look, hidden: Hidden, basis: Basis) -> np.ndarray:
    """Return frames with the PCA colours of predicted tokens, dark grey elsewhere: uint8 THWC."""
    colours_ND = np.zeros((*look.grid, 3), np.uint8)
    prediction_MD = np.asarray(hidden.prediction_MD)
    colours_ND.reshape(-1, 3)[hidden.target_ids_M] = features.colours(basis(prediction_MD))
    predicted = _roles(look, hidden) == frames.TARGET
    return frames.lay_over(look.video_BTHWC[0], colours_ND, predicted)


def error_maps(look: Look) -> dict[str, np.ndarray]:
    """Return the error of each loss term that has predictions and targets, THW."""
    return {
        name: features.errors(
            hidden.prediction_MD,
            hidden.target_MD,
            hidden.target_ids_M,
            look.grid,
        )
        for name, hidden in look.hidden.items()
        if hidden.prediction_MD is not None and hidden.target_MD is not None
    }


def paint_error(video_THWC: np.ndarray, error_THW: np.ndarray, top: float) -> np.ndarray:
    """Return frames with errors from 0 to `top` as colours, dark grey where NaN: uint8 THWC."""
    return frames.lay_over(video_THWC, heat(error_THW, 0.0, top), ~np.isnan(error_THW))


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map numbers from low to high to uint8 RGB; NaN gets the colour of `low`."""
    import matplotlib

    share = np.nan_to_num((values - low) / max(high - low, 1e-12))
    return matplotlib.colormaps[_HEAT](share, bytes=True)[..., :3]


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG; UserError if the path cannot be written."""
    try:
        figure.savefig(path, dpi=_SAVED_DPI)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def pixels(figure: "Figure") -> np.ndarray:
    """Render a figure as uint8 RGB, HWC."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _figure(width: float, height: float) -> Any:
    need()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="compressed")


def _table(
    rows: Sequence[Row], columns: Sequence[str], bar: tuple[float, float, str] | None = None
) -> Any:
    """Draw rows of pictures under column titles. bar: low end, high end and label of a colour bar.

    All pictures form one image, because one axis a picture would take matplotlib seconds.
    """
    height, width = np.max([pictures[0].shape[:2] for _, pictures in rows], axis=0)
    times = max(1, round(_PICTURE / width))
    height, width = times * height, times * width
    edge, gap = max(1, width // 100), max(2, width // 16)
    y, x = height + 2 * edge + gap, width + 2 * edge + gap
    canvas = np.full((y * len(rows) - gap, x * len(columns) - gap, 3), 255, np.uint8)
    for r, (_, pictures) in enumerate(rows):
        for c, picture in enumerate(pictures):
            up, across = height // picture.shape[0], width // picture.shape[1]
            tile = canvas[y * r : y * (r + 1) - gap, x * c : x * (c + 1) - gap]
            tile[:] = 60
            tile[edge:-edge, edge:-edge] = picture.repeat(up, axis=0).repeat(across, axis=1)
    figure = _figure(
        1.15 * len(columns) + 1.1 + (0.8 if bar else 0), 1.15 * len(rows) * height / width + 0.4
    )
    axis = figure.subplots()
    axis.imshow(canvas)
    axis.set_xticks(x * np.arange(len(columns)) + (x - gap) / 2, columns, fontsize=9)
    axis.set_yticks(y * np.arange(len(rows)) + (y - gap) / 2, [r for r, _ in rows], fontsize=9)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.spines[:].set_visible(False)
    if bar:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.ticker import MaxNLocator

        scale = ScalarMappable(Normalize(bar[0], bar[1]), _HEAT)
        figure.colorbar(scale, ax=axis, label=bar[2], shrink=0.9, aspect=25, ticks=MaxNLocator(5))
    return figure


def _picture(axis: Any, picture: np.ndarray) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set(xticks=[], yticks=[])


def _legend(figure: Any, named: Mapping[str, int]) -> None:
    from matplotlib.patches import Patch

    grey = np.full((len(frames.COLOURS), 1, 1, 3), 128, np.uint8)
    painted = frames.paint_roles(grey, np.arange(len(grey))[:, None, None])[:, 0, 0] / 255
    handles = [Patch(color=painted[role], label=name) for name, role in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(named), fontsize=9)


def _caption(text: str, width: int) -> np.ndarray:
    """Render a line of text as an image, uint8 HWC."""
    from matplotlib.figure import Figure

    # The extra half pixel is truncated; without it rounding could lose a whole pixel.
    figure = Figure(figsize=((width + 0.5) / _DPI, (_STRIP + 0.5) / _DPI), dpi=_DPI)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=9)
    return pixels(figure)


def _line_looks(count: int) -> list[dict[str, Any]]:
    """Return colour and mark of each run's lines."""
    return [
        {"color": _LINES[i % len(_LINES)], "marker": _MARKS[i % len(_MARKS)], "markersize": 4}
        for i in range(count)
    ]


def _roles(look: Look, hidden: Hidden) -> np.ndarray:
    return frames.roles(hidden.context_ids_K, hidden.target_ids_M, look.grid)


def _shown(look: Look) -> np.ndarray:
    """Return the indices of the tubelets that figures show."""
    T = look.grid[0]
    return np.unique(np.linspace(0, T - 1, min(T, _COLUMNS)).round().astype(int))


def _tubelets(look: Look) -> list[str]:
    return [f"frame {t * look.tubelet}" for t in _shown(look)]
