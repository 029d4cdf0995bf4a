"""The door: flags -> devices -> one call.

python -m wmjax.main --config=configs/debug_world_model.py
python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
python -m wmjax.main --mode=eval ...    the newest checkpoint: validation and linear probe
python -m wmjax.main --mode=demo ...    each component in turn, explained and drawn
"""

from pathlib import Path

from wmjax import __version__, door
from wmjax import config as configs

_HELP = """\
modes:
  train  until train.num_steps; the same command again goes on from the newest checkpoint
  eval   validation and linear probe of the newest checkpoint
  demo   each component in turn, with shapes and pictures, in a minute; trains nothing

examples:
  python -m wmjax.main --config=debug_world_model
      on generated video, on any laptop
  python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
      on a LeRobot dataset, the folder that holds meta/
  python -m wmjax.main --mode=demo --config=debug_world_model
      a first look at it all

exit codes:
  0         done
  2         something that you can put right, said in one to three lines
  130, 143  Ctrl-C or SIGTERM: saved, the same command goes on
"""


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    parser = door.parser("python -m wmjax.main", "Train a V-JEPA 2 style video world model.", _HELP)
    door.add_config(parser)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=Path,
        help="where checkpoints, metrics and pictures go; default: runs/NAME",
    )
    parser.add_argument("--mode", choices=["train", "eval", "demo"], default="train")
    parser.add_argument("--list", action="store_true", help="list the shipped configurations")
    flags, overrides = door.parse(parser, argv)
    if flags.list:
        for name in configs.list_configs():
            print(f"{name}\n    {configs.describe(name)}")
        print("\none of them: --config=NAME; a .py file of your own works too")
        return 0
    config = door.load(parser, flags, overrides)
    workdir = flags.workdir or Path("runs") / Path(flags.config).stem

    print(f"wmjax {__version__}: {flags.mode} {flags.config} in {workdir}", flush=True)
    if flags.mode != "demo":  # which explains it
        print(configs.outline(config))
    print("loading jax ...", flush=True)
    door.keep_compiled()  # after the flags: --help and --list answer without jax, at once
    if flags.mode == "demo":
        from wmjax.demo import demo

        return demo(config, workdir)
    from wmjax.train import evaluate, train

    return (train if flags.mode == "train" else evaluate)(config, workdir)


def cli() -> None:
    """Turn a user's mistake into its few lines and exit code 2."""
    door.leave(run, "interrupted; nothing was saved since the newest checkpoint")


if __name__ == "__main__":
    cli()
