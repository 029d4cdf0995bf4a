"""Acting in a simulator: a model that sees and knows the steps reaches its goals, others do not."""

import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recordings import refused

from wmjax import config as configs
from wmjax.commands.evaluate import evaluate
from wmjax.data.tools.record import record
from wmjax.envs.pool import Simulators
from wmjax.envs.tworoom import TwoRoom
from wmjax.evals import harness
from wmjax.evals.closed_loop import ClosedLoop
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
    run = json.loads((tmp_path / "evals.jsonl").read_text())["run"]
    assert run["recordings"] == [run["settings"]["data"]["root"]] == ["room"]
    assert str(tmp_path.parent) not in json.dumps(run)
    said = capsys.readouterr().out
    for name, rate in zip(("planned", "recorded actions"), ("planned", "recorded"), strict=True):
        (line,) = (line for line in said.splitlines() if line.strip().startswith(name))
        assert line.split()[len(name.split())] == f"{found[rate]:.0f}"
    table = said[said.index("tworoom: 20 goals") : said.index("standard error")]
    assert max(map(len, table.splitlines())) <= 80
    with av.open(str(tmp_path / "closed_loop/0_25.mp4")) as video:
        shape = {frame.to_ndarray(format="rgb24").shape for frame in video.decode(video=0)}
    assert shape == {(2 * SIZE, 8 * SIZE, 3)}


def test_random_and_still_are_the_simulators_own(room, tmp_path, monkeypatch):
    def to_goal(self):
        return np.clip((self._goal - self._place) / 5, -1, 1)

    monkeypatch.setattr(TwoRoom, "still", to_goal)
    monkeypatch.setattr(TwoRoom, "random", lambda self, rng: np.zeros(2))
    assert evaluate(config(room), tmp_path) == 0
    found, _ = rates(tmp_path)
    assert found["recorded"] == 100
    assert found["still"] > 50
    assert found["random"] == 0


def test_a_model_that_believes_the_opposite_does_not(room, tmp_path):
    evaluate(config(room, "model.name=test_closed_loop:Fool"), tmp_path)
    assert rates(tmp_path)[0]["planned"] < 30


def test_the_same_again(room, tmp_path):
    settings = config(room, "eval.env_episodes=6", "model.name=test_closed_loop:Fool")
    for name in "ab":
        evaluate(settings, tmp_path / name)
    assert rates(tmp_path / "a")[1] == rates(tmp_path / "b")[1]


def test_goals_and_seeds_compile_no_more_and_processes_change_nothing(room, tmp_path, caplog):
    few = "eval.env_episodes=6", "eval.env_goal=15"
    compiled = []
    for name, *overrides in (
        ("one",),
        ("more", "eval.env_goals=2", "eval.env_seeds=2"),
        ("shared", "eval.env_goals=2", "eval.env_seeds=2", "data.workers=2", "data.frames=6"),
    ):
        caplog.clear()
        with jax.log_compiles():
            evaluate(config(room, *few, *overrides), tmp_path / name)
        told = [text for text in caplog.messages if text.startswith("Finished XLA compilation")]
        compiled.append(sum("jit(plan)" in text for text in told))
    assert compiled == [1, 1, 1]
    _, entry = rates(tmp_path / "more")
    assert rates(tmp_path / "shared")[1] == entry  # starts do not depend on data.frames
    assert rates(tmp_path / "one")[1]["trials"] == entry["trials"][:1]
    trials = entry["trials"]
    found = [(trial["goal"], trial["seed"]) for trial in trials]
    assert found == [(goal, seed) for goal in (15, 30) for seed in (42, 43)]
    assert trials[0]["clips"] != trials[1]["clips"]
    near, far = (np.mean([trial["apart"] for trial in trials[i : i + 2]]) for i in (0, 2))
    assert near < far
    for name in FOUND:
        for trial in trials:
            usual, strict = trial["official"][name], trial["strict"][name]
            assert len(usual) == 6
            assert all(a >= b for a, b in zip(usual, strict, strict=True))
    assert [trial["familiar"] for trial in trials] == [0] * 4
    assert {path.name for path in (tmp_path / "more/closed_loop").iterdir()} == {
        *("0_15.mp4", "0_30.mp4")
    }


def test_start_and_goal_are_the_recorded_pictures(room, tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(
        ClosedLoop,
        "_show",
        lambda self, trial, _, seen, name: found.update(
            first=seen[0], second=seen[1], recorded=trial.picture_N2HWC
        ),
    )
    monkeypatch.setattr(TwoRoom, "picture", lambda self: np.zeros((SIZE, SIZE, 3), np.uint8))
    evaluate(config(room, "eval.env_episodes=6"), tmp_path)
    assert found["recorded"].shape == (6, 2, SIZE, SIZE, 3)
    assert np.ptp(found["recorded"], axis=(2, 3, 4)).min() > 200
    np.testing.assert_array_equal(found["first"], found["recorded"][:, 0])
    assert not found["second"].any()


def world(policy, env, pictures, states, own, goal):
    """Play as World does: the policy is asked, the pictures after the first are the simulators'."""
    envs = [TwoRoom(SIZE) for _ in pictures]
    for env, (start, end) in zip(envs, states, strict=True):
        env.set_goal(end)
        env.set_state(start)
    policy.set_env(envs)
    reached, shown_NHWC = np.zeros(len(envs), bool), pictures[:, 0]
    for _ in range(2 * goal):
        state_NS = np.stack([env.state[:own] for env in envs])
        info = {"pixels": shown_NHWC, "goal": pictures[:, 1], "proprio": state_NS}
        actions = policy.get_action({name: value[:, None] for name, value in info.items()})
        for env, action in zip(envs, actions, strict=True):
            env.step(action)
        reached |= [env.reached() for env in envs]
        shown_NHWC = np.stack([env.picture() for env in envs])
    return reached


def test_the_evaluator_harness_plays_the_same_by_the_usual_rule_alone(room, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(harness, "check", lambda env: None)
    monkeypatch.setattr(harness, "versions", lambda: {"stable-worldmodel": "9"})
    monkeypatch.setattr(harness, "evaluate", world)
    start = Simulators.__init__
    monkeypatch.setattr(
        Simulators, "__init__", lambda self, *a, **k: opened.append(self) or start(self, *a, **k)
    )
    both = "eval.evaluators=closed_loop,harness", "eval.env_episodes=6", "eval.env_goals=2"
    evaluate(config(room, *both), tmp_path)
    assert len(opened) == 1
    row = json.loads((tmp_path / "evals.jsonl").read_text())
    ours, theirs = row["closed_loop"], row["harness"]
    assert theirs["stable-worldmodel"] == "9"
    for mine, other in zip(ours["trials"], theirs["trials"], strict=True):
        assert mine.pop("strict").keys() == set(FOUND)
        assert other.pop("strict") == {}
        assert mine == other
    assert {"0_25.mp4", "0_50.mp4"} == {path.name for path in (tmp_path / "harness").iterdir()}


def test_the_stricter_rule_has_to_hold(room, tmp_path, monkeypatch):
    """A rule that counts every second step never holds for two."""
    steps = iter(range(10**9))
    monkeypatch.setattr(TwoRoom, "reached_strictly", lambda env: next(steps) // 6 % 2 == 0)
    strict = []
    for count in (1, 2):
        monkeypatch.setattr(TwoRoom, "strict_steps", count)
        evaluate(config(room, "eval.env_episodes=6"), tmp_path)
        strict.append(rates(tmp_path)[1]["trials"][0]["strict"]["still"])
    assert strict == [[1] * 6, [0] * 6]


def test_episodes_that_begin_like_a_training_episode_are_counted(room, tmp_path, capsys):
    """Two recordings of one seed, of which other episodes are held out."""
    record(tmp_path / "half", env="tworoom", policy="expert", episodes=7, steps=60, size=SIZE)
    both = f"data.mixture={room}:0.5,{tmp_path / 'half'}:0.5"
    evaluate(config(room, "data.root=", both, "eval.env_episodes=6"), tmp_path)
    (trial,) = rates(tmp_path)[1]["trials"]
    assert trial["familiar"] > 0
    assert f"warning: {trial['familiar']} of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("eval.env=pusht2", ("eval.env", "pusht2", "tworoom")),
        ("eval.env_goal=26", ("eval.env_goal", "26", "5")),
        ("eval.env_episodes=100000", ("eval.env_episodes", "100000")),
        ("eval.env_episodes=0", ("eval.env_episodes", "0")),
        ("data.ends=repeat", ("data.ends", "repeat", "drop", "eval.env")),
        ("eval.env_goals=0", ("eval.env_goals", "0")),
        ("eval.env_seeds=0", ("eval.env_seeds", "0")),
        ("eval.env_goals=3", ("eval.env_goal", "75", "55")),
        ("eval.env_plan=quick", ("quick", "short")),
        ("eval.labels=action", ("eval.env", "observation.state", "2")),
    ],
)
def test_what_does_not_fit_is_named(room, tmp_path, override, names):
    with refused(*names):
        evaluate(config(room, override), tmp_path)
