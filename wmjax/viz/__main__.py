"""The command line: `python -m wmjax.viz RUN_OR_MODEL` draws pictures and one HTML page of them.

python -m wmjax.viz runs/debug_world_model                   on the run's own held-out clips
python -m wmjax.viz facebook/vjepa2-vitl-fpc64-256 --dataset=DIR
python -m wmjax.viz runs/one runs/two runs/three             one figure with the curves of all
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import ml_collections

from wmjax import config as configs
from wmjax import door
from wmjax.errors import UserError, printable
from wmjax.run.files import refuse_links
from wmjax.viz import curves, page
from wmjax.viz.page import Section

if TYPE_CHECKING:  # jax is imported after the flags are parsed
    from wmjax.inference import Model
    from wmjax.viz.acting import Acted
    from wmjax.viz.look import Look

_FPS = 4.0  # of the videos: slow enough to compare six tiles


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = door.parser(
        "python -m wmjax.viz",
        "Draw masks, features, predictions and curves of a model, and one HTML page of them all.",
    )
    parser.add_argument(
        "models",
        metavar="RUN_OR_MODEL",
        nargs="+",
        help="a run's workdir, an imported folder, a folder of transformers, OWNER/NAME on the "
        "Hugging Face Hub, or a .pt file; any further ones are runs, for their curves only",
    )
    parser.add_argument(
        "--dataset",
        metavar="DIR",
        help="a LeRobot dataset; default: the run's own data, or generated video for other weights",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder to write; default: RUN/viz, or runs/viz for other weights",
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=16,
        metavar="N",
        help="clips to encode, 2 or more; the first is shown, all are searched for similar frames; "
        "default: 16",
    )
    parser.add_argument(
        "--trust",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="allow to import the model that the run's configuration names from this package, "
        "which runs its code; may be repeated; default: none",
    )
    flags, overrides = door.parse(parser, argv)
    if flags.clips < 2:
        raise UserError(f"--clips={flags.clips}: wanted 2 or more, because clips are compared")
    return flags, overrides


def configuration(
    model: "Model", dataset: str | None, overrides: list[str], trust: tuple[str, ...] = ()
) -> ml_collections.ConfigDict:
    """Return the run's configuration, or `base` updated from the weights, on the chosen data.

    overrides: KEY=VALUE, applied last. trust: packages outside wmjax that the run may name.
    """
    if "data" in model.config:
        data = model.config["data"] | ({"source": "lerobot"} if dataset else {})
        config = configs.from_plain({**model.config, "data": data}, trust)
    else:
        config = configs.get_config("base")
        own = model.config["model"]
        config.model.update({k: v for k, v in own.items() if k in config.model})
        clip = model.config["clip"]
        config.data.update(
            frames=clip.get("frames", 16),
            image_size=clip.get("size", 256),
            image_width=clip.get("width"),
            source="synthetic",
        )
    if dataset:
        config.data.update(source="lerobot", root=dataset, repo_id="", revision="", mixture="")
        config.data.record = ""
        config.data.members = ml_collections.ConfigDict()
    configs.override(config, overrides)
    return config


def see(
    name: str, dataset: str | None, overrides: list[str], clips: int, trust: tuple[str, ...]
) -> tuple["Look", "Acted | None", list[tuple[str, str]]]:
    """Load a model and encode clips; return the results and (name, value) facts for the page."""
    from wmjax import assemble, open_sources
    from wmjax.data.settings import size
    from wmjax.inference import load
    from wmjax.viz.acting import act
    from wmjax.viz.look import look, read_clips

    model = load(name, trust=trust)
    config = configuration(model, dataset, overrides, trust)
    if "data" in model.config:
        for line in configs.differences(model.config, configs.plain(config)):
            print(f"  not as in the run: {printable(line)}")
    assemble.check(config)
    source = open_sources.make_source(config, "validation")
    for note in source.notes:
        print(f"warning: {printable(note)}")
    print(f"held-out data: {printable(source.describe())}", flush=True)
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
        raise UserError(f"{name}: features are not finite: the model has diverged")
    acted = act(model, read) if model.acts and len(model.recordings) == 1 else None
    outline = (line.split(maxsplit=1) for line in assemble.outline(config).splitlines())
    facts = [
        ("weights", name),
        *((name, value) for name, value in outline),
        ("held-out data", source.describe()),
        ("clip shown", f"{seen.names[0]}, the first of {len(seen.names)} encoded"),
        (
            "tokens",
            f"{' x '.join(map(str, seen.grid))} (time, rows, columns), width "
            f"{seen.target_BND.shape[-1]}",
        ),
        *(("note", note) for note in model.notes),
    ]
    return seen, acted, facts


def write_pictures(seen: "Look", acted: "Acted | None", out: Path) -> list[Section]:
    """Write all pictures and videos of the clips into `out`; return them for the page."""
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
    if acted:
        figures |= {"rollouts": draw.rollouts(acted), "energies": draw.energies(acted)}
    for name, figure in figures.items():
        draw.save(figure, out / f"{name}.png")
    sections = [
        Section(title, text, out / f"{name}.png")
        for name, (title, text) in TEXTS.items()
        if name in figures
    ]
    for name in seen.hidden:
        path = out / f"clip_{name.replace('/', '_')}.mp4"
        write_mp4(path, draw.panels(seen, name, basis), _FPS)
        text = f"The whole clip and the predictions of this loss term, {_FPS:g} frames a second."
        sections.append(Section(f"Video: {name}", text, path))
    return sections


PROBE = (
    "How well a linear fit reads the recorded state from features, on held-out clips. 1 is best; 0 "
    "is as good as the mean. Training is worth it where trained features are above both random "
    "weights and pixels."
)
EARLY = (
    "Normal in the first {early:,} steps: the error stays near that of the mean token, "
    "predictions are grey, the rank of the targets falls and rises again, and the probe may be "
    "below random weights."
)
TEXTS = {
    "masks": (
        "Masks",
        "Blue tokens are the context, which the encoder sees. Orange tokens are the target, whose "
        "features are predicted. Dark tokens are neither. The labels count the tokens of a clip.",
    ),
    "features": (
        "Features: three principal components as colours",
        "Similar colours mean similar features. One PCA basis, fitted to the target features of "
        "all encoded clips, colours targets and predictions. The first component is lightness, the "
        "second runs from blue to yellow, the third from green to magenta. Predictions are shown "
        "at the predicted tokens only. A prediction that is greyer than its target is closer to "
        "the mean token.",
    ),
    "similarity": (
        "Similarity of one patch to all others",
        "Cosine between the features of the outlined patch and those of every patch, after "
        "subtracting the mean token. The outlined patch is the one that moves most in the middle "
        "of the clip.",
    ),
    "retrieval": (
        "Nearest frames in other clips",
        "Left: the middle frame of a clip. Beside it: the frames of other clips whose mean "
        "features are most similar, with their cosine.",
    ),
    "error": (
        "Prediction error",
        "Mean absolute difference between predicted and target features at the predicted tokens. "
        "Grey tokens are not predicted.",
    ),
    "rollouts": (
        "Roll-outs",
        "From the first frame and the recorded actions, the model imagines the frames that follow. "
        "Shown are the recorded frames whose embeddings are nearest to what it imagines, out of "
        "all encoded clips. The numbers count blocks of actions.",
    ),
    "energies": (
        "Energy of actions",
        "Distance from the imagined next frame to the recorded one, for a block that repeats one "
        "action. A model that is ready to plan has its lowest energy near the recorded action. "
        "Other numbers of the action are as recorded.",
    ),
}


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags, overrides = parse(argv)
    from wmjax.evals import verdict
    from wmjax.viz import draw

    draw.need()  # fail before a model is loaded
    first, *others = flags.models
    is_run = (Path(first) / curves.METRICS).is_file()
    out = flags.out or (Path(first) / "viz" if is_run else Path("runs") / "viz")
    runs = {name: curves.read(Path(name)) for name in ([first] if is_run else []) + others}
    print(f"loading {first}; pictures go to {out}", flush=True)
    door.keep_compiled()
    seen, acted, facts = see(first, flags.dataset, overrides, flags.clips, tuple(flags.trust))
    try:
        out.mkdir(parents=True, exist_ok=True)
        refuse_links(out)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written: {error.strerror}") from None
    sections = write_pictures(seen, acted, out)
    if all(hidden.prediction_MD is None for hidden in seen.hidden.values()):
        print("these weights do not predict: predictions and errors are not drawn")
    said = ""
    if is_run:
        newest = curves.newest(runs[first])
        said = verdict.text(newest, int(newest.get("step", 0)))
        if verdict.labels(newest):
            draw.save(draw.probe(newest), out / "probe.png")
            sections.insert(0, Section("Linear probe", PROBE, out / "probe.png"))
    if any(runs.values()):
        draw.save(draw.reports(runs), out / "curves.png")
        text = f"Figures of {curves.METRICS} over the steps of {', '.join(runs)}. "
        text += EARLY.format(early=verdict.EARLY)
        sections.append(Section("Loss and health", text, out / "curves.png"))
    else:
        print(f"{first}: no metrics in {curves.METRICS}; curves are not drawn")
    page.write(out / "index.html", f"wmjax: {first}", facts, sections, said)
    for section in sections:
        print(section.file)
    print(f"{out / 'index.html'}  (all of them on one page)")
    if said:
        print(verdict.wrapped(said))
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted")
