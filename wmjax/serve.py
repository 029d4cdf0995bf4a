"""The command line: `python -m wmjax.serve RUN --goal=FILE` answers robots with plans.

It speaks the protocol of openpi's client (envs/server.py), and compiles before it listens.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from wmjax import door
from wmjax.errors import UserError, printable

PORT = 8000

_HELP = """\
A client sends a dict: a picture for each camera, uint8 RGB of any size, by the camera's name or its
last part, and the state. The reply has "actions", (steps, numbers), in the units of the recording.
A message may bring a "goal" of its own, a picture or a dict of pictures.

  from openpi_client.websocket_client_policy import WebsocketClientPolicy
  client = WebsocketClientPolicy("localhost", 8000)
  actions = client.infer({"top": picture, "state": state})["actions"]
"""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = door.parser("python -m wmjax.serve", "Answer robots with plans.", _HELP)
    parser.add_argument("run", metavar="RUN", help="workdir of a run of lewm or vjepa2_ac")
    parser.add_argument(
        "--goal",
        action="append",
        default=[],
        metavar="[CAMERA=]FILE",
        help="picture of the goal, PNG or JPEG, once for each camera; none: messages bring it",
    )
    parser.add_argument(
        "--plan",
        default="short",
        metavar="NAME",
        help="how to plan: lewm, short, vjepa2_ac or fast, with keys after commas, as in "
        "fast,horizon=2; default: short",
    )
    parser.add_argument(
        "--recording", default="", metavar="NAME", help="which dataset of a mixture the robot is"
    )
    parser.add_argument(
        "--unbounded",
        action="store_true",
        help="plan outside the least and greatest recorded actions too",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="of products; default: bfloat16",
    )
    parser.add_argument(
        "--host",
        default="localhost",
        metavar="NAME",
        help="where to listen; default: localhost, this machine only",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"0: any free one; default: {PORT}"
    )
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="package of the run's model"
    )
    flags, overrides = door.parse(parser, argv)
    if overrides:
        parser.error(f"--config.{overrides[0]}: the run's own configuration is used")
    return flags


def read_goal(files: list[str]) -> Any:
    """Return the goal's pictures by camera, or one picture; None: there is none."""
    from wmjax.data.media.images import read_picture

    if not files:
        return None
    if len(files) == 1 and ("=" not in files[0] or Path(files[0]).exists()):
        return read_picture(Path(files[0]))
    goal = {}
    for each in files:
        camera, equals, file = each.partition("=")
        if not equals:
            raise UserError(f"--goal={each}: wanted CAMERA=FILE, for one of several cameras")
        goal[camera] = read_picture(Path(file))
    return goal


def run(argv: list[str]) -> int:
    """Serve until Ctrl-C; UserError passes through."""
    flags = parse(argv)
    goal = read_goal(flags.goal)
    door.keep_compiled()
    import numpy as np

    from wmjax import inference
    from wmjax.envs.server import Server

    model = inference.load(flags.run, dtype=flags.dtype, trust=tuple(flags.trust))
    bounds = None if flags.unbounded else "recorded"

    def answer(shown: dict[str, Any], own: Any, where: tuple[int, int]) -> dict[str, Any]:
        wanted = goal if own is None else own
        if wanted is None:
            raise UserError("goal: neither the server nor the message has one")
        found = model.plan(
            shown, wanted, plan=flags.plan, recording=flags.recording, bounds=bounds, seed=where
        )
        return {"actions": found.action.astype(np.float32), "cost": float(found.cost)}

    about = model.policy(goal, plan=flags.plan, recording=flags.recording, bounds=bounds).meta
    print(printable(f"{flags.run}: {flags.plan}; compiling ..."), flush=True)
    blank = {name: np.zeros((8, 8, 3), np.uint8) for name in about["cameras"]}
    state = np.zeros(about["state_size"], np.float32)
    begun = time.perf_counter()
    for number in range(2):
        answer(blank | {"state": state}, goal if goal is not None else blank, (-1, number))
        taken, begun = time.perf_counter() - begun, time.perf_counter()
    with Server(answer, about, flags.host, flags.port) as server:
        print(
            printable(
                f"listening on ws://{flags.host}:{server.port}, {1e3 * taken:.0f} ms a plan; "
                f"{about['block']} actions between two frames, {about['fps']:g} a second"
            ),
            flush=True,
        )
        server.serve_forever()
    return 0


if __name__ == "__main__":
    door.run_and_exit(run, "interrupted")
