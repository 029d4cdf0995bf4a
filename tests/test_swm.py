"""stable-worldmodel's own code over our models, where it is installed with torch: `-m campaign`.

Its World plays the tasks of our closed loop, and its CEM searches over our costs.
"""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import train

import wmjax
from wmjax import config as configs
from wmjax.commands.evaluate import evaluate
from wmjax.data.tools.record import record
from wmjax.envs import harness
from wmjax.envs.base import make
from wmjax.evals.closed_loop import ClosedLoop
from wmjax.planning import plan as planning
from wmjax.planning import search

MISSING = [n for n in ("torch", "stable_worldmodel") if not importlib.util.find_spec(n)]
pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # theirs
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

SIZE, COUNT, GOAL = 64, 20, 25
CAMERA = "observation.image"
TINY = (
    *("width=48", "depth=2", "heads=3", "embedding=32", "projector=64", "head_width=32"),
    *("predictor_depth=1", "predictor_heads=2", "predictor_head_width=16", "predictor_hidden=64"),
)
PLAN = "short,samples=128,iterations=3,elites=16,head=false"  # 128 x 3 x 2
FOUND = ("planned", "recorded", "random", "still")


@pytest.fixture(scope="module")
def pusht(tmp_path_factory):
    """A recording of 30 episodes of the expert, half of them held out."""
    folder = tmp_path_factory.mktemp("pusht") / "pusht"
    record(
        folder, env="swm/PushT-v1", policy="expert", episodes=30, steps=80, size=SIZE, images=True
    )
    return folder


@pytest.fixture(scope="module")
def run(pusht, tmp_path_factory):
    """Configuration and workdir of a tiny LeWM after a few steps."""
    settings = (
        *(f"data.root={pusht}", f"data.image_size={SIZE}", "data.batch_size=8", "data.frames=4"),
        *("data.val_share=0.5", "data.workers=0", "train.num_steps=20", "optim.schedule_steps=20"),
        *("train.eval_every=0", "eval.probe_every=0", "eval.evaluators=closed_loop,harness"),
        *("eval.env=swm/PushT-v1", f"eval.env_episodes={COUNT}", f"eval.env_plan={PLAN}"),
    )
    config = configs.load("lewm_pusht", (*(f"model.{each}" for each in TINY), *settings))
    workdir = tmp_path_factory.mktemp("run")
    assert train(config, workdir) == 0
    return config, workdir


def sensitive(workdir):
    """Load a run whose predictions depend on actions: the layer that reads them begins at zero."""
    model = wmjax.load(workdir)
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        reads = "modulation" in jax.tree_util.keystr(path)
        return jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype) if reads else leaf

    model.params = jax.tree_util.tree_map_with_path(drawn, model.params)
    return model


def entries(workdir):
    """Return the entries of both evaluators."""
    row = json.loads((workdir / "evals.jsonl").read_text().splitlines()[-1])
    return row["closed_loop"], row["harness"]


def reached(entry):
    """Return the outcomes of its one trial by policy."""
    (trial,) = entry["trials"]
    return trial["official"]


def test_world_and_our_closed_loop_play_the_same_push_t(run, monkeypatch):
    """To the last bit: each picture of each step, until World stops an episode that succeeded."""
    config, workdir = run
    seen = {}
    monkeypatch.setattr(
        ClosedLoop, "_show", lambda self, *found: seen.update({self.name: np.stack(found[2])})
    )
    assert evaluate(config, workdir) == 0
    ours, theirs = entries(workdir)
    assert reached(ours) == reached(theirs)
    assert (len(ours["trials"][0]["strict"]), theirs["trials"][0]["strict"]) == (4, {})
    found = reached(theirs)
    assert tuple(found) == FOUND
    # Contacts are chaotic, and a state has 32 bits: a replay of the recorded actions can miss.
    assert np.mean(found["recorded"]) >= 0.9
    assert sum(found["random"]) <= COUNT // 4
    assert sum(found["still"]) == 0  # a start that counts as its goal is left out
    going = ~np.array(found["planned"], bool)
    assert seen["harness"].shape == (2 * GOAL, COUNT, SIZE, SIZE, 3)
    np.testing.assert_array_equal(seen["harness"][:, going], seen["closed_loop"][:, going])
    assert np.any(seen["harness"][0] != seen["harness"][-1])
    assert {"stable-worldmodel", "torch", "pymunk"} <= theirs.keys()


@pytest.mark.parametrize(("model", "least", "most"), [("Seer", 80, 100), ("Fool", 0, 30)])
def test_world_and_our_closed_loop_agree_on_tworoom(model, least, most, tmp_path):
    """Its pictures are shrunk in another way, so a plan may differ, and an episode in twenty."""
    room = tmp_path / "room"
    record(room, env="tworoom", policy="expert", episodes=20, steps=60, size=SIZE, images=True)
    settings = (
        *(f"data.root={room}", "data.source=lerobot", "data.stride=5", "data.frames=3"),
        *(f"data.image_size={SIZE}", "data.batch_size=8", "data.val_share=0.5", "data.workers=0"),
        *("eval.evaluators=closed_loop,harness", "eval.env=tworoom", "eval.env_episodes=20"),
        *("eval.env_plan=short,samples=64", "train.eval_every=1", "optim.schedule_steps=10"),
        f"model.name=test_closed_loop:{model}",
    )
    assert evaluate(configs.load("debug_world_model", settings), tmp_path / "run") == 0
    ours, theirs = map(reached, entries(tmp_path / "run"))
    for name in ("recorded", "random", "still"):
        assert ours[name] == theirs[name], name
    assert least <= 100 * np.mean(theirs["planned"]) <= most
    assert np.sum(np.not_equal(ours["planned"], theirs["planned"])) <= 1


def cem_of_theirs():
    """Return their CEM, and the name that it has for a cost: another one in 0.1.1."""
    try:
        from stable_worldmodel.planning.solver import CEMSolver
    except ImportError:
        from stable_worldmodel.solver import CEMSolver

        return CEMSolver, "model"
    return CEMSolver, "cost"


def solver_of_theirs(monkeypatch, settings, cost, keys_of):
    """Return their CEM over a cost. It draws what ours draws: keys_of(info) -> keys of the rows."""
    import torch

    CEMSolver, argument = cem_of_theirs()

    class Same(CEMSolver):
        def solve(self, info_dict, init_action=None):
            self.keys, self.number = keys_of(info_dict), 0
            return super().solve(info_dict, init_action=init_action)

    def randn(count, *shape, **_):
        noise = search.normal(search._fold(solver.keys, solver.number), shape)
        assert len(noise) == count
        solver.number += 1
        return torch.tensor(np.asarray(noise))

    monkeypatch.setattr(torch, "randn", randn)
    solver = Same(
        **{argument: cost},
        batch_size=COUNT,
        num_samples=settings.samples,
        n_steps=settings.iterations,
        topk=settings.elites,
        var_scale=settings.std,
    )
    return solver


def plan_config(settings, block):
    from stable_worldmodel.policy import PlanConfig

    return PlanConfig(settings.horizon, settings.replan or settings.horizon, action_block=block)


def episodes():
    """Return recorded pictures and states of starts and goals, of the expert."""
    env, pictures, states = make("swm/PushT-v1", size=SIZE), [], []
    for episode in range(COUNT):
        rng = np.random.default_rng(episode)
        env.reset(rng)
        act = env.expert(rng)
        first = env.picture(), env.state
        for _ in range(GOAL):
            env.step(act())
        pictures.append([first[0], env.picture()])
        states.append([first[1], env.state])
    return np.array(pictures), np.array(states)


@pytest.mark.parametrize("preset", ["lewm,samples=100,iterations=6,elites=10", PLAN])
def test_their_cem_over_our_cost_is_ours(run, monkeypatch, preset):
    """The same draws give the same candidates in each iteration, so mean and std, and the plan."""
    import gymnasium
    import torch

    model = sensitive(run[1])
    pictures, states = episodes()
    settings = search.parse(f"{preset},head=false")
    P, A = model._blueprint.abstract.block
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(7), row))(jnp.arange(COUNT))
    shown = {CAMERA: pictures[:, 0], "state": states[:, 0, :4]}
    (seen, wanted, *_), _ = model._actor._arguments(shown, pictures[:, 1], "", None, 0)

    ours = []

    def search_ours(params):
        acting, target = model._actor._built(params)
        latent = acting.observe(target, seen)
        goal_BND = acting.embedding(acting.observe(target, wanted))

        def cost(action_BSHA):
            jax.debug.callback(lambda each: ours.append(np.array(each)), action_BSHA, ordered=True)
            return planning.score(acting, latent, goal_BND, action_BSHA, settings)

        first = jnp.zeros((COUNT, settings.horizon, P * A))
        return search.cem(cost, first, keys_B, settings, None)

    plan, _ = jax.block_until_ready(jax.jit(search_ours)(model.params))
    jax.effects_barrier()

    theirs = []

    class Kept(harness.Cost):
        def get_cost(self, info, action_candidates):
            theirs.append(action_candidates.numpy().copy())
            return super().get_cost(info, action_candidates)

    cost = Kept(model, settings)
    solver = solver_of_theirs(monkeypatch, settings, cost, lambda _: keys_B)
    space = gymnasium.spaces.Box(-1, 1, (COUNT, A))
    solver.configure(action_space=space, n_envs=COUNT, config=plan_config(settings, P))
    info = {"pixels": pictures[:, :1], "goal": pictures[:, 1:], "proprio": states[:, :1, :4]}
    found = solver({name: torch.tensor(value) for name, value in info.items()})
    assert len(theirs) == settings.iterations
    assert len(ours) == settings.iterations + 1  # the last is the plan itself
    for mine, other in zip(ours, theirs, strict=False):
        np.testing.assert_allclose(other, mine, atol=1e-4)
    np.testing.assert_allclose(found["actions"], plan, atol=1e-4)
    assert np.abs(plan).max() > 0.1


class Scaler:
    """Their scaler of actions, with the statistics of a run."""

    def __init__(self, model):
        numbers = model._blueprint.statistics[0]["action"]
        self.mean, self.std = (np.asarray(numbers[name], np.float32) for name in ("mean", "std"))

    def transform(self, action):
        return (action - self.mean) / self.std

    def inverse_transform(self, action):
        return action * self.std + self.mean


class Kept:
    """A policy of World that keeps the actions of another."""

    type, seed = "kept", None

    def __init__(self, policy):
        self.policy, self.actions = policy, []

    def set_env(self, env):
        self.policy.set_env(env)

    def get_action(self, info):
        self.actions.append(np.array(self.policy.get_action(info)))
        return self.actions[-1]


def test_their_policy_and_solver_over_our_cost_act_as_our_policy(run, monkeypatch):
    """20 episodes of 50 steps: queues, warm starts, replans and units are the same."""
    from stable_worldmodel.policy import WorldModelPolicy

    model = sensitive(run[1])
    pictures, states = episodes()
    settings, seed = search.parse(PLAN), 3
    task = "swm/PushT-v1", pictures, states, 4, GOAL
    ours = Kept(
        harness.Harness(lambda goal: model.policy(goal, plan=settings, bounds=None, seed=seed))
    )
    reached = harness.evaluate(ours, *task)

    plans = iter(range(100))

    def keys_of(info):
        """Ours of (seed, episode, plan, row); World drops rows that have reached their goal."""
        goals = info["goal"][:, -1].numpy()
        same = np.all(goals[:, None] == pictures[None, :, 1], axis=(2, 3, 4))
        key = jax.random.key(0)
        for number in (seed, 0, next(plans)):
            key = jax.random.fold_in(key, number)
        rows = jnp.asarray(np.argmax(same, axis=1))
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)

    cost = harness.Cost(model, settings)
    solver = solver_of_theirs(monkeypatch, settings, cost, keys_of)
    block = model._blueprint.abstract.block[0]
    scaled = {"action": Scaler(model)}
    theirs = Kept(WorldModelPolicy(solver, plan_config(settings, block), process=scaled))
    np.testing.assert_array_equal(harness.evaluate(theirs, *task), reached)
    mine, other = np.stack(ours.actions), np.stack(theirs.actions)
    assert mine.shape == other.shape == (2 * GOAL, COUNT, 2)
    going = np.isfinite(other)  # NaN: it has reached its goal
    assert going.mean() > 0.5
    np.testing.assert_allclose(other[going], mine[going], atol=1e-3)
