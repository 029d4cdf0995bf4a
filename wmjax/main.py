"""The command line: flags -> devices -> one call to a mode. No computation happens here.

python -m wmjax.main --config=configs/debug_world_model.py
python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
python -m wmjax.main --mode=eval --workdir=runs/mine    evaluate the newest checkpoint
python -m wmjax.main --mode=demo ...    show each component with its shapes
python -m wmjax.main --mode=plan --topology=v5e:16x16 ...    compile for a pod, on any CPU
python -m wmjax.main --coordinator=HOST:PORT --processes=N --process=I ...    one of N hosts
"""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from wmjax import __version__, door
from wmjax import config as configs
from wmjax.errors import UserError, printable
from wmjax.run import cluster
from wmjax.run.files import check_workdir, refuse_links

_HELP = """\
modes:
  train  train until train.num_steps; resume from the newest checkpoint in the workdir
  eval   run the evaluators (validation, linear probe) on the newest checkpoint
  demo   show each component with shapes and pictures, in about a minute; saves no training
  plan   compile the train step for a pod that is not here: memory per chip, and what bounds it

examples:
  python -m wmjax.main --config=lewm_tworoom_cpu
      record a small simulator, train and act in it: minutes on any laptop
  python -m wmjax.main --config=debug_world_model
      train V-JEPA 2 on generated video
  python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
      train on a LeRobot dataset; DIR contains meta/
  python -m wmjax.main --mode=demo --config=debug_world_model
      see each component once
  python -m wmjax.main --mode=plan --config=vjepa2_aloha --topology=v5e:16x16 \\
      --config.data.batch_size=256 --config.model.scan=True --config.model.remat=full
      check that a run fits before you pay for 256 chips

other commands, each with --help:
  python -m wmjax.viz      draw what a model sees and predicts
  python -m wmjax.data     check, transcode and summarise recordings
  python -m wmjax.weights  import, export and show weights
  python -m wmjax.evals    make the table of closed-loop results
  python -m wmjax.bench    time the train step or the data path

exit codes:
  0         done
  1         plan: the step does not fit into memory
  2         an error that you can fix; one to three lines say what is wrong
  75        no progress for train.stuck_after seconds; every thread's stack is printed
  76        another process of the run died or does not answer
  128 + N   signal N (130: Ctrl-C, 143: SIGTERM, 138: SIGUSR1): the last step is saved
after 75, 76 and 128 + N the same command resumes
"""


def run(argv: list[str], start: Callable[..., None] = lambda *_: None) -> int:
    """Run one mode and return its exit code. Raises UserError for errors that the user can fix.

    start(coordinator, processes, process): joins the other processes of the run. Called before the
    first use of a device.
    """
    parser = door.parser("python -m wmjax.main", "Train a video world model on robot video.", _HELP)
    door.add_config(parser)
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=Path,
        help="folder for checkpoints, metrics and pictures; one that has a run gives its "
        "configuration too; default: runs/NAME",
    )
    parser.add_argument(
        "--mode",
        choices=["train", "eval", "demo", "plan"],
        default="train",
        help="what to do, see below; default: train",
    )
    parser.add_argument(
        "--topology",
        metavar="NAME",
        help="devices to plan for, with --mode=plan: v5e:16x16, v6e:16x16, cpu:N, gpu:N",
    )
    cluster.add_flags(parser)
    parser.add_argument(
        "--list", action="store_true", help="list the shipped configurations and exit"
    )
    flags, overrides = door.parse(parser, argv)
    if flags.list:
        for name in configs.list_configs():
            print(f"{name}\n    {configs.describe(name)}")
        print("\nuse one with --config=NAME, or a file of your own with --config=FILE.py")
        return 0
    try:
        if not flags.config and flags.workdir and (flags.workdir / "config.json").is_file():
            flags.config = str(flags.workdir)
        config = door.load(parser, flags, overrides)
        named = Path(flags.config)
        own = named.parent if named.suffix == ".json" else Path("runs") / named.stem
        workdir = flags.workdir or own
        check_workdir(workdir)
        refuse_links(workdir)
        if flags.mode in ("train", "eval"):  # before jax is loaded, which takes seconds
            configs.check_data(config)
    except UserError:
        # The other processes, if there are any, wait for this one.
        if flags.mode != "plan" and not cluster.looks_alone(flags.coordinator):
            with contextlib.suppress(UserError):
                start(flags.coordinator, flags.processes, flags.process)
        raise

    door.keep_compiled()  # imports jax, so --help and --list answer without that delay
    if flags.mode == "plan":  # needs no other process, also inside a cluster
        from wmjax.commands.plan import plan

        if not flags.topology:
            parser.error("--mode=plan: needs --topology=NAME, as in --topology=v5e:16x16")
        print(f"wmjax {__version__}: plan {flags.config} for {flags.topology}", flush=True)
        return plan(config, flags.topology)
    start(flags.coordinator, flags.processes, flags.process)
    if cluster.speaks() and flags.mode != "demo":  # the demo prints the outline itself
        print(printable(f"wmjax {__version__}: {flags.mode} {flags.config} in {workdir}"))
        from wmjax import assemble

        print(printable(assemble.outline(config)), flush=True)
    if flags.mode == "demo":
        from wmjax.commands.demo import demo

        return demo(config, workdir)
    if flags.mode == "eval":
        from wmjax.commands.evaluate import evaluate

        return evaluate(config, workdir)
    from wmjax.train import train

    return train(config, workdir)


def cli() -> None:
    """Run the command line and exit with its code; a UserError prints and exits with 2."""
    door.run_and_exit(
        cluster.ending_together(partial(run, start=cluster.start)),
        "interrupted; nothing was saved since the newest checkpoint",
    )


if __name__ == "__main__":
    cli()
