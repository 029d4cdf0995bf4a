"""The door: flags -> devices -> one call.

python -m wmjax.main --config=configs/debug_world_model.py
python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
python -m wmjax.main --mode=eval ...    the newest checkpoint: validation and linear probe
python -m wmjax.main --mode=demo ...    each component in turn, explained and drawn
python -m wmjax.main --mode=plan --topology=v5e:16x16 ...    compiled for a pod, on any CPU
python -m wmjax.main --coordinator=HOST:PORT --processes=N --process=I ...    where JAX finds none
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from wmjax import __version__, door
from wmjax import config as configs
from wmjax.run import cluster

_HELP = """\
modes:
  train  until train.num_steps; the same command again goes on from the newest checkpoint
  eval   validation and linear probe of the newest checkpoint
  demo   each component in turn, with shapes and pictures, in a minute; trains nothing
  plan   the train step compiled for a pod that is not there: does it fit, and what bounds it

examples:
  python -m wmjax.main --config=debug_world_model
      on generated video, on any laptop
  python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
      on a LeRobot dataset, the folder that holds meta/
  python -m wmjax.main --mode=demo --config=debug_world_model
      a first look at it all
  python -m wmjax.main --mode=plan --config=vjepa2_aloha --topology=v5e:16x16 \\
      --config.data.batch_size=256 --config.model.scan=True --config.model.remat=full
      before paying for 256 chips

other doors, each with --help:
  python -m wmjax.viz      pictures of what a model sees and predicts
  python -m wmjax.data     check, transcode and stats of recordings
  python -m wmjax.weights  import, export and show
  python -m wmjax.bench    what a step takes, and a batch

exit codes:
  0         done
  1         plan: it does not fit
  2         something that you can put right, said in one to three lines
  75        no step for train.stuck_after seconds: every thread's stack is printed
  130, 143  Ctrl-C or SIGTERM: saved, the same command goes on (SIGUSR1: 138)
"""


def run(argv: list[str], start: Callable[..., None] = lambda *_: None) -> int:
    """Run one command and return its exit code; UserError passes through.

    start: joins the processes of the run, where this process is not yet using its devices.
    """
    parser = door.parser("python -m wmjax.main", "Train a V-JEPA 2 style video world model.", _HELP)
    door.add_config(parser)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=Path,
        help="where checkpoints, metrics and pictures go; default: runs/NAME",
    )
    parser.add_argument(
        "--mode", choices=["train", "eval", "demo", "plan"], default="train", help="default: train"
    )
    parser.add_argument(
        "--topology", metavar="NAME", help="of --mode=plan: v5e:16x16, v6e:16x16, cpu:N, gpu:N"
    )
    cluster.add_flags(parser)
    parser.add_argument("--list", action="store_true", help="list the shipped configurations")
    flags, overrides = door.parse(parser, argv)
    if flags.list:
        for name in configs.list_configs():
            print(f"{name}\n    {configs.describe(name)}")
        print("\none of them: --config=NAME; a .py file of your own works too")
        return 0
    config = door.load(parser, flags, overrides)
    workdir = flags.workdir or Path("runs") / Path(flags.config).stem

    door.keep_compiled()  # after the flags: --help and --list answer without jax, at once
    if flags.mode == "plan":  # by this process alone, whatever cluster it is in
        from wmjax.commands.plan import plan

        if not flags.topology:
            parser.error("--mode=plan: --topology=NAME is needed, as in --topology=v5e:16x16")
        return plan(config, flags.topology)
    start(flags.coordinator, flags.processes, flags.process)
    if cluster.speaks() and flags.mode != "demo":  # which explains it
        print(f"wmjax {__version__}: {flags.mode} {flags.config} in {workdir}")
        from wmjax import assemble

        print(assemble.outline(config), flush=True)
    if flags.mode == "demo":
        from wmjax.commands.demo import demo

        return demo(config, workdir)
    if flags.mode == "eval":
        from wmjax.commands.evaluate import evaluate

        return evaluate(config, workdir)
    from wmjax.train import train

    return train(config, workdir)


def cli() -> None:
    """Turn a user's mistake into its few lines and exit code 2."""
    door.run_and_exit(
        partial(run, start=cluster.start),
        "interrupted; nothing was saved since the newest checkpoint",
    )


if __name__ == "__main__":
    cli()
