"""The command line: `python -m wmjax.evals` makes the table of closed-loop results.

python -m wmjax.evals runs/a0 runs/a1 runs/a2 --out=lewm.json    one system, from three seeds
python -m wmjax.evals lewm.json other.json                       the table of both
"""

import argparse
from pathlib import Path

from wmjax import door
from wmjax.errors import UserError
from wmjax.evals import table
from wmjax.run.files import to_json, write_whole


def parse(argv: list[str]) -> argparse.Namespace:
    parser = door.Parser(
        prog="python -m wmjax.evals",
        description="Print the table of closed-loop results as Markdown.",
    )
    parser.add_argument(
        "results",
        metavar="RUN_OR_FILE",
        nargs="+",
        type=Path,
        help="workdirs of one system's runs, evaluated with --mode=eval and eval.env; or files "
        "that --out wrote, one for each system",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="also write the rows of the runs to FILE.json, whose name is the system's",
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    flags = parser.parse_args(argv)
    if flags.out and flags.out.suffix != ".json":
        raise UserError(f"--out={flags.out}: wanted a name that ends in .json")
    return flags


def run(argv: list[str]) -> int:
    """Run the command and return its exit code; UserError passes through."""
    flags = parse(argv)
    folders = [path for path in flags.results if path.is_dir()]
    files = [path for path in flags.results if path not in folders]
    if flags.out and files:
        raise UserError(f"--out={flags.out}: found the file {files[0]}: wanted workdirs only")
    systems = {path.stem: table.read_file(path) for path in files}
    if folders:
        name = flags.out.stem if flags.out else folders[0].name
        systems[name] = [table.read_run(folder) for folder in folders]
    if len(systems) < len(files) + bool(folders):
        raise UserError(f"{', '.join(map(str, flags.results))}: wanted systems of different names")
    sections = table.table(systems)
    if flags.out:
        try:
            write_whole(flags.out, to_json({"runs": systems[flags.out.stem]}) + "\n")
        except OSError as error:
            raise UserError(f"--out={flags.out}: not written: {error.strerror}") from None
    print(to_json(sections, indent=2) if flags.json else table.markdown(sections))
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted")
