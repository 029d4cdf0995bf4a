"""The door: `python -m wmjax.data transcode ROOT OUT`, `check ROOT` and `stats ROOT`."""

import argparse
import os
import sys
from pathlib import Path

from wmjax.data.transcode import transcode
from wmjax.errors import UserError


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m wmjax.data",
        description="Tools for LeRobot datasets, v2.0 to v3.0.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writes = commands.add_parser(
        "transcode", help="write it again with small videos that decode fast; resumes"
    )
    writes.add_argument("root", metavar="ROOT", type=Path, help="the dataset's folder")
    writes.add_argument("out", metavar="OUT", type=Path, help="a new folder, or a half-done one")
    writes.add_argument("--size", type=int, default=256, help="pixels of the shorter side (256)")
    writes.add_argument("--gop", type=int, default=2, help="frames a key frame (2)")
    writes.add_argument("--crf", type=int, default=20, help="H.264's: less is better, larger (20)")
    writes.add_argument("--cameras", default="all", help="names, separated by commas (all)")
    writes.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (cores)")
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags = parse(argv)
    for note in transcode(
        flags.root,
        flags.out,
        size=flags.size,
        gop=flags.gop,
        crf=flags.crf,
        cameras=flags.cameras,
        workers=flags.workers,
    ):
        print(f"warning: {note}", file=sys.stderr)
    print(f"written to {flags.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on", file=sys.stderr)
        sys.exit(130)
