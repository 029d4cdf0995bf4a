"""The door: `python -m wmjax.weights import SRC DIR`, `export DIR OUT` and `show SRC`."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from flax import traverse_util

from wmjax import checkpoint
from wmjax.errors import UserError
from wmjax.weights.export import export
from wmjax.weights.files import MODEL, write_safetensors
from wmjax.weights.load import abstract_params, assemble, leaves_of, summarise
from wmjax.weights.source import CONFIG, Source, open_source


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m wmjax.weights",
        description="Weights in and out.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    source = "a folder (safetensors), OWNER/NAME on the Hugging Face Hub, or a .pt file of Meta"
    reads = commands.add_parser("import", help="to a folder of wmjax")
    reads.add_argument("source", metavar="SRC", help=source)
    reads.add_argument("folder", metavar="DIR", type=Path)
    writes = commands.add_parser("export", help="to a folder for transformers")
    writes.add_argument("folder", metavar="DIR", type=Path, help="an imported one, or a run's")
    writes.add_argument("out", metavar="OUT", type=Path)
    writes.add_argument("--frames", type=int, help="of a clip, where DIR does not say")
    writes.add_argument("--size", type=int, help="of a clip in pixels, where DIR does not say")
    shows = commands.add_parser("show", help="names, shapes and sizes")
    shows.add_argument("source", metavar="SRC", help=source)
    for command in (reads, shows):
        command.add_argument(
            "--encoder",
            default="target_encoder",
            help="which one of a .pt file (target_encoder, the EMA; or encoder)",
        )
    return parser.parse_args(argv)


def import_folder(source: Source, folder: Path) -> None:
    """Write a source as model.safetensors under our paths, and model.json beside it."""
    leaves = leaves_of(abstract_params(source))
    arrays = assemble(source, leaves)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(
            folder / MODEL,
            {path: leaf.shape for path, leaf in leaves.items()},
            (array for _, array in arrays),
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    text = {
        "model": {"name": "vjepa2", **source.model} if source.model else {},
        "classifier": source.classifier,
        "clip": source.clip,
        "source": source.where,
        "notes": source.notes,
    }
    (folder / CONFIG).write_text(json.dumps(text, indent=2) + "\n")


def export_folder(folder: Path, out: Path, frames: int | None, size: int | None) -> str:
    """Write an imported folder for transformers; return what was written."""
    source = open_source(folder)
    frames, size = frames or source.clip.get("frames"), size or source.clip.get("size")
    if not frames or not size:
        raise UserError(f"{folder}: frames and size of its clips unknown: give --frames and --size")
    flat = dict(assemble(source, leaves_of(abstract_params(source))))
    export(
        traverse_util.unflatten_dict(flat, sep="."),
        source.model,
        out,
        frames=frames,
        size=size,
        classifier=source.classifier or None,
    )
    return f"{out}: the weights of {folder}"


def export_run(workdir: Path, out: Path, frames: int | None, size: int | None) -> str:
    """Write a run's newest checkpoint for transformers; return what was written."""
    step, state, meta = checkpoint.read(
        workdir / "checkpoints",
        lambda saved: {
            "target": saved["target"],
            "params": {"predictor": saved["params"]["predictor"]},
        },
    )
    config = meta["config"]
    metrics = last_metrics(workdir / "metrics.jsonl", step)
    export(
        {"encoder": state["target"], "predictor": state["params"]["predictor"]},
        config["model"],
        out,
        frames=frames or config["data"]["frames"],
        size=size or config["data"]["image_size"],
        config=config,
        metrics={"step": step, **metrics},
    )
    return f"{out}: the EMA target encoder and the predictor of {workdir}, step {step}"


def last_metrics(file: Path, step: int) -> dict[str, float]:
    """Return the last value by this step of the loss, of validation and of probes."""
    found: dict[str, float] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        row = json.loads(line)
        if row["step"] <= step:
            found |= row
    return {
        key: value
        for key, value in found.items()
        if key == "loss" or key.startswith(("validation/", "probe/"))
    }


def show(source: Source) -> str:
    """Return a table of the names in a source, layers joined, and what becomes of them."""
    lines = []
    homes = {name: row.ours for row in source.format.rows for name in (*row.theirs, row.gain)}
    for name, shape in source.tensors.shapes.items():
        home = next((ours for theirs, ours in homes.items() if matches(theirs, name)), "")
        home = home or ("left out" if source.format.ignores(name) else "unknown")
        lines.append(f"{name} {shape} {source.tensors.dtypes[name]} -> {home}")
    count = sum(math.prod(shape) for shape in source.tensors.shapes.values())
    return "\n".join([*summarise(lines), "", *describe(source, count)])
