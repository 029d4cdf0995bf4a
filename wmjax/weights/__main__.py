"""The command line: `python -m wmjax.weights import SRC DIR`, `export DIR OUT`, `show SRC`."""

import argparse
import dataclasses
import math
from pathlib import Path

from flax import traverse_util

from wmjax import door
from wmjax.errors import UserError, printable
from wmjax.run.files import read_json_lines, to_json
from wmjax.weights.export import export, export_meta, square_clip
from wmjax.weights.files import MODEL, write_safetensors
from wmjax.weights.load import abstract_params, assemble, leaves_of, summarise
from wmjax.weights.pretrained import CONFIG, Pretrained, open_pretrained
from wmjax.weights.tables import matches

META = ("vjepa2_ac", "vjepa21")  # exported for Meta's code, because transformers has none
ITEM_BYTES = {"float16": 2, "bfloat16": 2}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = door.Parser(
        prog="python -m wmjax.weights",
        description="Convert weights: to and from transformers, from Meta's files, from a run.",
    )
    commands = parser.add_subparsers(dest="command", metavar="{import,export,show}", required=True)
    source = (
        "a folder with safetensors, a run's workdir, OWNER/NAME on the Hugging Face Hub, or a .pt "
        "file of Meta"
    )
    reads = commands.add_parser("import", help="convert any format into a folder of wmjax")
    reads.add_argument("source", metavar="SRC", help=source)
    reads.add_argument("folder", metavar="DIR", type=Path, help="folder to write")
    writes = commands.add_parser(
        "export", help="convert a run or an imported folder into one for transformers"
    )
    writes.add_argument(
        "folder", metavar="DIR", type=Path, help="imported folder, or workdir of a run"
    )
    writes.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    writes.add_argument(
        "--frames", type=int, metavar="N", help="frames of a clip; default: as DIR says"
    )
    writes.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="height and width of a clip; default: as DIR says",
    )
    shows = commands.add_parser("show", help="list names, shapes and sizes")
    shows.add_argument("source", metavar="SRC", help=source)
    for command in (reads, shows, writes):
        command.add_argument(
            "--trust",
            metavar="PACKAGE",
            action="append",
            default=[],
            help="allow to import the run's model from this package, which runs its code; may be "
            "repeated; default: none",
        )
    for command in (reads, shows):
        command.add_argument(
            "--encoder",
            default="",
            help="encoder of a .pt file or a run: target_encoder (the EMA) or encoder; default: "
            "the EMA where there is one",
        )
        for name, what in (("heads", "encoder or probe"), ("predictor-heads", "predictor")):
            command.add_argument(
                f"--{name}",
                type=int,
                metavar="N",
                help=f"attention heads of the {what} of a .pt file, which does not say them; "
                "default: assumed, as a note says",
            )
        command.add_argument(
            "--probe",
            type=int,
            default=0,
            metavar="N",
            help="which of the probes of a .pt file of Meta's evaluations; default: 0, the first",
        )
    return door.parse_command(parser, commands.choices, argv)


def import_folder(source: Pretrained, folder: Path) -> None:
    """Write model.safetensors, named by our paths, and model.json into a folder."""
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
        "model": {"name": "vjepa2"} | source.model if source.model else {},
        "classifier": source.classifier,
        "labels": source.labels,
        "clip": source.clip,
        "spec": dataclasses.asdict(source.spec),
        "source": source.where,
        "notes": source.notes,
    }
    (folder / CONFIG).write_text(to_json(text, indent=2) + "\n")


def export_folder(
    folder: Path, out: Path, frames: int | None, size: int | None, trust: tuple[str, ...] = ()
) -> str:
    """Write an imported folder, or a run's newest checkpoint, for transformers; return a line."""
    source = open_pretrained(folder, trust=trust)
    if source.model.get("name") in META:
        export_meta(source, out)
        return "\n".join(
            [f"wrote the weights of {folder} to {out}, for Meta's code", *source.notes]
        )
    frames, size = square_clip(str(folder), source.clip, frames, size)
    other = [
        f"--{name}={given}: the clips of {folder} have {source.clip[name]}"
        for name, given in (("frames", frames), ("size", size))
        if source.clip.get(name, given) != given
    ]
    if source.model.get("name", "vjepa2") != "vjepa2":
        raise UserError(
            f"{folder}: model.name={source.model['name']!r}: transformers has no such model; "
            "wanted a run of vjepa2"
        )
    metrics = last_metrics(folder / "metrics.jsonl", source.step)
    flat = dict(assemble(source, leaves_of(abstract_params(source))))
    export(
        traverse_util.unflatten_dict(flat, sep="."),
        source.model,
        out,
        frames=frames,
        size=size,
        classifier=source.classifier or None,
        labels=source.labels,
        config=source.config,
        metrics={"step": source.step, **metrics} if source.step else None,
    )
    return "\n".join([f"wrote the weights of {folder} to {out}", *other, *source.notes])


def last_metrics(file: Path, step: int) -> dict[str, float]:
    """Return the newest loss, validation and probe figures up to and including a step."""
    found: dict[str, float] = {}
    for row in read_json_lines(file):
        if row["step"] <= step:
            found |= row
    return {
        key: value
        for key, value in found.items()
        if key == "loss" or key.startswith(("validation/", "probe/"))
    }


def show(source: Pretrained) -> str:
    """Return a table of all tensors, a line for all layers, and the parameters they become."""
    form, tensors = source.format, source.tensors
    paths = [
        (pattern, row.path) for row in form.rows for pattern in (*row.names, row.other) if pattern
    ]
    lines = []
    for name, shape in tensors.shapes.items():
        fits = [path for pattern, path in paths if matches(pattern, name)]
        found = ", ".join(fits) or ("dropped" if form.ignores(name) else "unknown")
        lines.append(f"{name} {shape} {tensors.dtypes[name]} -> {found}")
    return "\n".join([*summarise(lines), describe(source)])


def describe(source: Pretrained) -> str:
    """Describe a source: format, parts, sizes, model and what was assumed."""
    shapes, types = source.tensors.shapes, source.tensors.dtypes
    count = sum(math.prod(shape) for shape in shapes.values())
    size = sum(math.prod(shape) * ITEM_BYTES.get(types[name], 4) for name, shape in shapes.items())
    arguments = {"model": source.model, "classifier": source.classifier, "clip": source.clip}
    return "\n".join(
        [
            f"{source.where}: {source.format.name}",
            f"{', '.join(source.parts)}: {len(shapes)} tensors, {count:,} parameters, "
            f"{size / 2**20:,.1f} MiB",
            *(
                f"{what}: " + ", ".join(f"{key}={value}" for key, value in values.items())
                for what, values in arguments.items()
                if values
            ),
            *source.notes,
        ]
    )


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags = parse(argv)
    door.check_xla_flags()
    if flags.command == "export":
        if not flags.folder.is_dir():
            raise UserError(f"{flags.folder}: no such folder")
        print(export_folder(flags.folder, flags.out, flags.frames, flags.size, tuple(flags.trust)))
        return 0
    source = open_pretrained(
        flags.source,
        encoder=flags.encoder,
        heads=flags.heads,
        predictor_heads=flags.predictor_heads,
        probe=flags.probe,
        trust=tuple(flags.trust),
    )
    name = source.model.get("name", "vjepa2")
    if flags.command == "import" and (name not in ("vjepa2", *META) or source.statistics):
        raise UserError(
            f"{flags.source}: a run of model.name={name!r} with statistics of its data: wmjax.load "
            "opens the workdir itself; wanted weights to import"
        )
    if flags.command == "show":
        print(printable(show(source)))
        return 0
    import_folder(source, flags.folder)
    print(f"{printable(describe(source))}\nwrote {flags.folder}")
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted")
