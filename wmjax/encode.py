"""Encodes a whole LeRobot dataset with loaded weights, once, into a folder of features.

    python -m wmjax.encode runs/vjepa2_aloha DIR OUT --frames=16 --size=256

The same command resumes. See Model.encode_dataset in wmjax/inference.py.
"""

import argparse
from pathlib import Path

from wmjax import door


def parse(argv: list[str]) -> argparse.Namespace:
    parser = door.Parser(
        prog="python -m wmjax.encode",
        description="Encode a LeRobot dataset into a folder; the same command resumes.",
    )
    parser.add_argument("source", metavar="SRC", help="weights that wmjax.load accepts")
    parser.add_argument("root", metavar="DIR", type=Path, help="the dataset's folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder, or one to resume")
    parser.add_argument("--frames", type=int, metavar="T", help="of a clip; default: as SRC says")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="of a frame's side; default: as SRC says"
    )
    parser.add_argument(
        "--fps", type=float, default=4.0, help="highest frame rate of a clip; default: 4"
    )
    parser.add_argument(
        "--cameras", default="each", help="names, separated by commas; default: each"
    )
    parser.add_argument(
        "--clips", type=int, default=8, metavar="B", help="encoded at once; default: 8"
    )
    parser.add_argument(
        "--threads", type=int, default=8, metavar="N", help="that decode; default: 8"
    )
    parser.add_argument(
        "--dtype", help="of matrix products: float32 (default) or bfloat16, faster on GPUs"
    )
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Encode and return the exit code; UserError passes through."""
    asked = vars(parse(argv))
    door.keep_compiled()
    from wmjax.inference import load

    model = load(asked.pop("source"), dtype=asked.pop("dtype"))
    out = asked["out"]
    model.encode_dataset(**asked)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted: the same command resumes")
