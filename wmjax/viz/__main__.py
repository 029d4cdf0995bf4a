"""The door: `python -m wmjax.viz RUN_OR_MODEL --dataset=DIR --out=DIR`: pictures, and one page.

python -m wmjax.viz runs/debug_world_model                   on the run's own held-out clips
python -m wmjax.viz facebook/vjepa2-vitl-fpc64-256 --dataset=DIR
python -m wmjax.viz runs/one runs/two runs/three             the curves of all in one figure
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import ml_collections

from wmjax import config as configs
from wmjax import door
from wmjax.errors import UserError
from wmjax.viz import curves, page
from wmjax.viz.page import Section

if TYPE_CHECKING:  # jax is loaded once the flags are read
    from wmjax.inference import Model
    from wmjax.viz.look import Look

_FPS = 4.0  # of the videos, whatever the recording's: slow enough to compare six pictures


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = door.parser(
        "python -m wmjax.viz", "Draw what a model sees, predicts and learned; one page of it all."
    )
    parser.add_argument(
        "models",
        metavar="RUN_OR_MODEL",
        nargs="+",
        help="a run's workdir, an imported folder, a folder of transformers, OWNER/NAME on the "
        "Hugging Face Hub, or a .pt file; further ones are runs whose curves are drawn too",
    )
    parser.add_argument(
        "--dataset",
        metavar="DIR",
        help="a LeRobot dataset; default: the run's own data, or generated video",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/viz, or runs/viz")
    parser.add_argument(
        "--clips", type=int, default=16, metavar="N", help="that are looked at (16); one is shown"
    )
    parser.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="import the model that the run's configuration names from this package",
    )
    flags, overrides = door.parse(parser, argv)
    if flags.clips < 2:
        raise UserError(f"--clips={flags.clips}: wanted 2 or more, to compare them")
    return flags, overrides


def configuration(
    model: "Model", dataset: str | None, overrides: list[str], trust: tuple[str, ...] = ()
) -> ml_collections.ConfigDict:
    """Return the run's configuration, or base with what the weights say, on the chosen data."""
    if "data" in model.config:
        config = configs.from_plain(model.config)
    else:
        config = configs.get_config("base")
        own = model.config["model"]
        config.model.update({k: v for k, v in own.items() if k in config.model})
        clip = model.config["clip"]
        config.data.update(
            frames=clip.get("frames", 16), image_size=clip.get("size", 256), source="synthetic"
        )
    if dataset:
        config.data.update(source="lerobot", root=dataset, repo_id="", revision="", mixture="")
        config.data.members = ml_collections.ConfigDict()
    configs.override(config, overrides)
    return config


def see(
    name: str, dataset: str | None, overrides: list[str], clips: int, trust: tuple[str, ...]
) -> tuple["Look", list[tuple[str, str]]]:
    """Load the model and look at clips; return that and facts to tell."""
    from wmjax import assemble
    from wmjax.data.settings import size
    from wmjax.inference import load
    from wmjax.viz.look import look, read_clips

    model = load(name, trust=trust)
    config = configuration(model, dataset, overrides)
    assemble.check(config)
    source = assemble.make_source(config, "validation")
    for note in source.notes:
        print(f"warning: {note}")
    print(f"held-out data: {source.describe()}", flush=True)
    masks = assemble.make_masks(config)
    read = read_clips(
        source,
        masks,
        size=size(config.data),
        count=clips,
        seed=config.seed,
        skip=config.data.on_error == "skip",
    )
    print(f"encoding {len(read)} clips ...", flush=True)
    seen = look(model, read, masks)
    if not seen.finite:
        raise UserError(f"{name}: gives features that are not finite: it has diverged")
    facts = [
        ("model", name),
        ("held-out data", source.describe()),
        ("shown", f"{seen.names[0]} of {len(seen.names)} looked at"),
        ("tokens", f"{' x '.join(map(str, seen.grid))}, {seen.target_BND.shape[-1]} wide"),
        *(("note", note) for note in model.notes),
    ]
    return seen, facts


def write_pictures(seen: "Look", out: Path) -> list[Section]:
    """Draw everything that shows the clips into `out`."""
    from wmjax.viz import draw, features, frames
    from wmjax.viz.video import write_mp4

    basis = features.fit_basis(seen.target_BND)
    predicts = any(hidden.prediction_MD is not None for hidden in seen.hidden.values())
    masked = any(len(hidden.context_ids_K) for hidden in seen.hidden.values())
    token = frames.busiest(seen.video_BTHWC[0], seen.grid)
    figures = {
        **({"masks": draw.masks(seen)} if masked else {}),
        "features": draw.components(seen, basis),
        "similarity": draw.similarity(seen, token),
        "retrieval": draw.retrieval(seen),
    }
    if predicts:
        figures["error"] = draw.errors(seen)
    for name, figure in figures.items():
        draw.save(figure, out / f"{name}.png")
    sections = [
        Section(title, text, out / f"{name}.png")
        for name, (title, text) in TEXTS.items()
        if name in figures
    ]
    for name in seen.hidden:
        path = out / f"clip_{name}.mp4"
        write_mp4(path, draw.panels(seen, name, basis), _FPS)
        text = f"The whole clip under this mask, {_FPS:g} frames a second."
        sections.append(Section(f"Video: mask {name}", text, path))
    return sections


TEXTS = {
    "masks": (
        "Masks",
        "Blue tokens are the context, which the encoder sees; orange ones are the target, whose "
        "features are predicted from it; dark ones are neither. The numbers are tokens of a clip.",
    ),
    "features": (
        "Features, three principal components as colour",
        "Equal colours: similar features. One basis, fitted to the targets of all clips that were "
        "looked at, colours every frame, target and prediction. The first component is lightness, "
        "the second blue to yellow, the third green to magenta. Predictions are shown where the "
        "mask hides the frame; a prediction that is greyer than its target is less sure.",
    ),
    "similarity": (
        "One patch against all others",
        "Cosine between the features of the marked patch, where the clip moves most, and those of "
        "every other patch, after the mean token is taken away.",
    ),
    "retrieval": (
        "Nearest frames in other clips",
        "Left: the middle of a clip. Beside it the frames of the other clips whose mean features "
        "are most like it, with the cosine.",
    ),
    "error": (
        "Error of the prediction",
        "Mean absolute difference between predicted and target features at the hidden tokens; "
        "grey: not predicted.",
    ),
}


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags, overrides = parse(argv)
    from wmjax.viz import draw

    draw.need()  # before a model is loaded
    first, *others = flags.models
    is_run = (Path(first) / curves.METRICS).is_file()
    out = flags.out or (Path(first) / "viz" if is_run else Path("runs") / "viz")
    runs = {name: curves.read(Path(name)) for name in ([first] if is_run else []) + others}
    print(f"loading {first}; pictures go to {out}", flush=True)
    door.keep_compiled()
    seen, facts = see(first, flags.dataset, overrides, flags.clips, tuple(flags.trust))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from None
    sections = write_pictures(seen, out)
    if all(hidden.prediction_MD is None for hidden in seen.hidden.values()):
        print("no predictions in these weights: no prediction and no error is drawn")
    if any(runs.values()):
        draw.save(draw.reports(runs), out / "curves.png")
        text = f"From {curves.METRICS}, over the steps of {', '.join(runs)}."
        sections.append(Section("Loss and health", text, out / "curves.png"))
    else:
        print(f"no {curves.METRICS} in {first}: no curves are drawn")
    page.write(out / "index.html", f"wmjax: {first}", facts, sections)
    for section in sections:
        print(section.file)
    print(f"{out / 'index.html'}  (everything on one page)")
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted")
