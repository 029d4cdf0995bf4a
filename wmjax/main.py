"""The door: flags -> devices -> one call.

python -m wmjax.main --config=configs/debug_world_model.py
python -m wmjax.main --config=vjepa2_aloha --config.data.root=DIR --workdir=runs/mine
python -m wmjax.main --mode=eval ...    the newest checkpoint: validation and linear probe
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from wmjax import config as configs
from wmjax.errors import UserError


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into flags and KEY=VALUE overrides of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m wmjax.main",
        description="Train a V-JEPA 2 style video world model.",
        epilog="Any key of the configuration: --config.KEY=VALUE, as in "
        "--config.optim.learning_rate=3e-4 (configs/base.py explains every key).",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="NAME", help="a shipped configuration, or a .py file")
    parser.add_argument("--workdir", metavar="DIR", type=Path, help="default: runs/NAME")
    parser.add_argument("--mode", choices=["train", "eval"], default="train")
    parser.add_argument("--list", action="store_true", help="list the shipped configurations")
    flags, rest = parser.parse_known_args(argv)
    prefix = "--config."
    overrides = []
    while rest:
        word = rest.pop(0)
        if not word.startswith(prefix):
            parser.error(
                f"{word}: unknown; keys of the configuration are written --config.KEY=VALUE"
            )
        if "=" not in word and rest and not rest[0].startswith("--"):
            word += "=" + rest.pop(0)
        overrides.append(word.removeprefix(prefix))
    if not flags.list and not flags.config:
        parser.error(f"--config=NAME is needed; shipped: {', '.join(configs.list_configs())}")
    return flags, overrides


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; UserError passes through."""
    flags, overrides = parse(argv)
    if flags.list:
        for name in configs.list_configs():
            print(f"{name:20} {configs.describe(name)}")
        return 0
    config = configs.load(flags.config, overrides)
    workdir = flags.workdir or Path("runs") / Path(flags.config).stem

    import jax  # after the flags: --help and --list answer at once

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path.home() / ".cache" / "wmjax")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    from wmjax.train import evaluate, train

    return (train if flags.mode == "train" else evaluate)(config, workdir)


def cli() -> None:
    """Turn a user's mistake into its few lines and exit code 2."""
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the newest checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    cli()
