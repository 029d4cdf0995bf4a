"""Acting in a simulator: a model that sees and knows the steps reaches its goals, others do not."""

import json

import av
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recordings import refused

from wmjax import config as configs
from wmjax.commands.evaluate import evaluate
from wmjax.data.tools.record import record
from wmjax.models.acting import ActingModel
from wmjax.types import WorldModelOutput

SIZE = 64
FOUND = ("planned", "recorded", "random", "still")


class Seer(ActingModel):
    """Reads the place of the red dot off the picture, and adds the actions; sees no walls."""

    uses_masks, speed = False, 5.0

    def __init__(self, spec):
        self.unused = nnx.Param(jnp.zeros(1))
        self.block = spec.stride, spec.action_size

    @classmethod
    def create(cls, settings, compute, spec, statistics, rngs):
        return cls(spec)

    @classmethod
    def token_grid(cls, settings, frames, height, width):
        return frames, 1, 1

    def loss(self, target, batch, key):
        return WorldModelOutput(jnp.sum(self.unused[...] ** 2))

    def features(self, target, video_BTHWC):
        return jnp.zeros((*video_BTHWC.shape[:2], 1))

    def observe(self, target, observation):
        picture_BHWC = jnp.asarray(observation.video_BVTHWC)[:, 0, -1].astype(jnp.float32)
        red_BHW = jnp.maximum(picture_BHWC[..., 0] - picture_BHWC[..., 1] - 20, 0)
        at = (jnp.arange(SIZE, dtype=jnp.float32) + 0.5) * 224 / SIZE - 0.5
        total = red_BHW.sum((1, 2))
        y, x = (
            (red_BHW * shape).sum((1, 2)) / total for shape in (at[None, :, None], at[None, None])
        )
        return jnp.stack([x, y], axis=1)

    def imagine(self, latent, action_BA):
        return latent + self.speed * action_BA.reshape(-1, *self.block).sum(1)

    def embedding(self, latent):
        return latent[:, None]

    def to_model(self, action_BHPA, ids):
        B, H, P, A = action_BHPA.shape
        return jnp.asarray(action_BHPA).reshape(B, H, P * A)

    def to_robot(self, action_BHA, ids):
        return action_BHA.reshape(*action_BHA.shape[:2], *self.block)


class Fool(Seer):
    """Believes that the dot goes the other way."""

    speed = -5.0


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A recording of 20 episodes of 60 steps, half of them held out."""
    folder = tmp_path_factory.mktemp("room") / "room"
    record(folder, env="tworoom", policy="expert", episodes=20, steps=60, size=SIZE, images=True)
    return folder


def config(room, *overrides):
    settings = (
        *(f"data.root={room}", "data.source=lerobot", "data.stride=5", "data.frames=3"),
        *(f"data.image_size={SIZE}", "data.batch_size=8", "data.val_share=0.5", "data.workers=0"),
        *("eval.evaluators=closed_loop", "eval.env=tworoom", "eval.env_episodes=20"),
        *("eval.env_plan=short,samples=64", "train.eval_every=1", "optim.schedule_steps=10"),
    )
    return configs.load(
        "debug_world_model", ("model.name=test_closed_loop:Seer", *settings, *overrides)
    )


def rates(workdir):
    """Return the rates of the first trial, and the entry in evals.jsonl."""
    entry = json.loads((workdir / "evals.jsonl").read_text().splitlines()[-1])["closed_loop"]
    reached = entry["trials"][0]["official"]
    return {name: 100 * np.mean(reached[name]) for name in FOUND}, entry


def test_a_model_that_knows_reaches_its_goals_and_the_table_says_so(room, tmp_path, capsys):
    assert evaluate(config(room), tmp_path) == 0
    found, entry = rates(tmp_path)
    assert found["recorded"] == 100
    assert found["planned"] >= 80
    assert found["still"] == 0
    assert found["random"] < 60
    (trial,) = entry["trials"]
    assert len(trial["apart"]) == 20
    assert min(trial["apart"]) >= 16
    assert trial["solved"] > 0
    said = capsys.readouterr().out
    for name, rate in zip(("planned", "recorded actions"), ("planned", "recorded"), strict=True):
        (line,) = (line for line in said.splitlines() if line.strip().startswith(name))
        assert line.split()[len(name.split())] == f"{found[rate]:.0f}"
    table = said[said.index("tworoom: 20 goals") : said.index("standard error")]
    assert max(map(len, table.splitlines())) <= 80
    with av.open(str(tmp_path / "closed_loop/0_25.mp4")) as video:
        shape = {frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)}
    assert shape == {(2 * SIZE, 8 * SIZE, 3)}


def test_a_model_that_believes_the_opposite_does_not(room, tmp_path):
    evaluate(config(room, "model.name=test_closed_loop:Fool"), tmp_path)
    assert rates(tmp_path)[0]["planned"] < 30


def test_the_same_again(room, tmp_path):
    settings = config(room, "eval.env_episodes=6", "model.name=test_closed_loop:Fool")
    for name in "ab":
        evaluate(settings, tmp_path / name)
    assert rates(tmp_path / "a")[1] == rates(tmp_path / "b")[1]


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("eval.env=pusht2", ("eval.env", "pusht2", "tworoom")),
        ("eval.env_goal=26", ("eval.env_goal", "26", "5")),
        ("eval.env_episodes=100000", ("eval.env_episodes", "100000")),
        ("eval.env_episodes=0", ("eval.env_episodes", "0")),
        ("eval.env_plan=quick", ("quick", "short")),
        ("eval.labels=action", ("eval.env", "observation.state", "2")),
    ],
)
def test_what_does_not_fit_is_named(room, tmp_path, override, names):
    with refused(*names):
        evaluate(config(room, override), tmp_path)
