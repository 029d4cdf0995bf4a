"""Command line of the data tools: `python -m wmjax.data check`, `record`, `stats`, `transcode`."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from wmjax import door
from wmjax.data.lerobot.episodes import Dropped
from wmjax.data.lerobot.info import read_info
from wmjax.data.lerobot.listing import Wanted, all_of, list_episodes
from wmjax.data.lerobot.paths import Folder
from wmjax.data.lerobot.recording import width_of
from wmjax.data.lerobot.tables import read_tables
from wmjax.data.stats import summarize
from wmjax.data.tools.check import Finding, check, table_of
from wmjax.data.tools.record import record
from wmjax.data.tools.transcode import transcode
from wmjax.envs.base import ENVIRONMENTS
from wmjax.errors import ExitCode, printable
from wmjax.run.files import to_json


def parse(argv: list[str]) -> argparse.Namespace:
    parser = door.Parser(
        prog="python -m wmjax.data",
        description="Tools for LeRobot datasets, v2.0 to v3.0.",
    )
    commands = parser.add_subparsers(
        dest="command", metavar="{transcode,record,check,stats}", required=True
    )
    writes = commands.add_parser(
        "transcode", help="copy it with small videos that decode fast; the same command resumes"
    )
    writes.add_argument("root", metavar="ROOT", type=Path, help="the dataset's folder")
    writes.add_argument("out", metavar="OUT", type=Path, help="a new folder, or one to resume")
    writes.add_argument(
        "--size", type=int, default=256, help="pixels of the shorter side (default 256)"
    )
    writes.add_argument(
        "--gop", type=int, default=2, help="frames from key frame to key frame (default 2)"
    )
    writes.add_argument(
        "--crf", type=int, default=20, help="H.264 quality, 0 to 51: lower is better (default 20)"
    )
    writes.add_argument("--cameras", default="all", help="names, separated by commas (default all)")
    writes.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)"
    )
    records = commands.add_parser(
        "record", help="play episodes in a simulator and write them; the same command resumes"
    )
    records.add_argument("out", metavar="OUT", type=Path, help="a new folder, or one to resume")
    records.add_argument(
        "--env", required=True, help=f"{', '.join(ENVIRONMENTS)}, or package.module:Name"
    )
    records.add_argument(
        "--policy", default="expert", help="expert, the environment's own (default), or random"
    )
    records.add_argument("--episodes", type=int, default=500, help="how many (default 500)")
    records.add_argument("--steps", type=int, default=100, help="of an episode (default 100)")
    records.add_argument("--size", type=int, default=96, help="pixels of a side (default 96)")
    records.add_argument("--seed", type=int, default=0, help="of starts and policy (default 0)")
    records.add_argument(
        "--images", action="store_true", help="PNG in the tables, exact to the bit (default: video)"
    )
    records.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)"
    )
    checks = commands.add_parser(
        "check", help="print everything that is wrong with it; exit code 2 if anything is"
    )
    checks.add_argument("root", metavar="ROOT", type=Path, help="the dataset's folder")
    checks.add_argument(
        "--decode",
        action="store_true",
        help="decode every frame (default: only the first of each table with images)",
    )
    counts = commands.add_parser("stats", help="print statistics of state and action as JSON")
    counts.add_argument("root", metavar="ROOT", type=Path, help="the dataset's folder")
    counts.add_argument(
        "--state", default="observation.state", help="its feature (default observation.state)"
    )
    counts.add_argument("--action", default="action", help="its feature (default action)")
    for command in (writes, checks, counts):
        command.add_argument(
            "--follow-links",
            action="store_true",
            help="links in the dataset may lead outside its folder (default: an error)",
        )
    return door.parse_command(parser, commands.choices, argv)


def statistics(root: Path, state: str, action: str, follow_links: bool = False) -> dict[str, Any]:
    """Summarise state and action over all episodes; reads no videos."""
    folder, dropped = Folder(root, follow_links), Dropped(skip=False)
    info = read_info(folder)
    features = info["features"]
    widths = {
        name: width_of(folder.root, features, flag, name)
        for flag, name in (("--state", state), ("--action", action))
    }
    episodes, _ = list_episodes(folder, info, Wanted(), all_of, [], dropped)
    _, tables, _ = read_tables(episodes, widths, fps=info["fps"], dropped=dropped)
    return {name: summarize(values) for name, values in tables.items()}


def as_json(tables: dict[str, dict[str, Any]]) -> str:
    """Return JSON with each statistic of each feature on its own line."""
    parts = []
    for name, rows in tables.items():
        lines = (f"    {to_json(key)}: {to_json(value)}" for key, value in rows.items())
        parts.append(f"  {to_json(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}"


def report(findings: list[Finding], looked_at: str) -> int:
    """Print what check found; return its exit code."""
    if findings:
        print(table_of(findings))
    print(f"{printable(looked_at)}: {f'{len(findings)} wrong' if findings else 'fine'}")
    return ExitCode.MEND if findings else ExitCode.DONE


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags = parse(argv)
    if flags.command == "check":
        return report(*check(flags.root, decode=flags.decode, follow_links=flags.follow_links))
    if flags.command == "stats":
        print(as_json(statistics(flags.root, flags.state, flags.action, flags.follow_links)))
        return 0
    if flags.command == "record":
        settings = {name: value for name, value in vars(flags).items() if name != "command"}
        record(**settings)
        print(f"written to {flags.out}")
        return 0
    for note in transcode(
        flags.root,
        flags.out,
        size=flags.size,
        gop=flags.gop,
        crf=flags.crf,
        cameras=flags.cameras,
        workers=flags.workers,
        follow_links=flags.follow_links,
    ):
        print(f"warning: {printable(note)}", file=sys.stderr)
    print(f"written to {flags.out}")
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted: the same command again resumes")
