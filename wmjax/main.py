"""The door: flags -> devices -> one call.

python -m wmjax.main --config=configs/debug_world_model.py
python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
python -m wmjax.main --mode=eval ...    the newest checkpoint: validation and linear probe
python -m wmjax.main --coordinator=HOST:PORT --processes=N --process=I ...    where JAX finds none
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from wmjax import cluster, door
from wmjax import config as configs


def run(argv: list[str], start: Callable[..., None] = lambda *_: None) -> int:
    """Run one command and return its exit code; UserError passes through.

    start: joins the processes of the run, where this process is not yet using its devices.
    """
    parser = door.parser("python -m wmjax.main", "Train a V-JEPA 2 style video world model.")
    door.add_config(parser)
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="default: runs/NAME")
    parser.add_argument("--mode", choices=["train", "eval"], default="train")
    cluster.add_flags(parser)
    parser.add_argument("--list", action="store_true", help="list the shipped configurations")
    flags, overrides = door.parse(parser, argv)
    if flags.list:
        for name in configs.list_configs():
            print(f"{name:20} {configs.describe(name)}")
        return 0
    config = door.load(parser, flags, overrides)
    workdir = flags.workdir or Path("runs") / Path(flags.config).stem

    start(flags.coordinator, flags.processes, flags.process)
    door.keep_compiled()  # after the flags: --help and --list answer without jax, at once
    from wmjax.train import evaluate, train

    return (train if flags.mode == "train" else evaluate)(config, workdir)


def cli() -> None:
    """Turn a user's mistake into its few lines and exit code 2."""
    door.leave(
        partial(run, start=cluster.start),
        "interrupted; nothing was saved since the newest checkpoint",
    )


if __name__ == "__main__":
    cli()
