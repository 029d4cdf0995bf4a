"""gym-pusht and gym-aloha as environments; `-m campaign` plays them where they are installed."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from micro import ROOT
from recordings import refused
from says import says
from shared_data import SHARED, needs_shared

from wmjax.data.tools.check import check
from wmjax.data.tools.record import record
from wmjax.envs import base

MODULES = {
    "swm/PushT-v1": "stable_worldmodel",
    "gym_pusht/PushT-v0": "gym_pusht",
    "gym_aloha/AlohaTransferCube-v0": "gym_aloha",
    "gym_aloha/AlohaInsertion-v0": "gym_aloha",
}
EXTRAS = {"stable_worldmodel": "swm", "gym_pusht": "sim", "gym_aloha": "sim"}
HERE = {module: importlib.util.find_spec(module) is not None for module in EXTRAS}


def simulator(name):
    lacks = pytest.mark.skipif(not HERE[MODULES[name]], reason=f"{MODULES[name]} is not installed")
    warnings = pytest.mark.filterwarnings("ignore")  # of their libraries
    return pytest.param(name, marks=[pytest.mark.campaign, lacks, warnings])


PUSHT, CUBE, INSERTION = (simulator(name) for name in list(MODULES)[1:])
each = pytest.mark.parametrize("name", [PUSHT, CUBE, INSERTION])


def play(env, actions):
    states = [env.state]
    for action in actions:
        env.step(action)
        states.append(env.state)
    return np.array(states)


@pytest.mark.parametrize("name", MODULES)
def test_without_its_package_it_is_refused_in_a_line(name, monkeypatch):
    module = MODULES[name]
    monkeypatch.setitem(sys.modules, module, None)
    extra = EXTRAS[module]
    with refused("--env", name, module, f"'.[{extra}]'", f"uv run --extra {extra}", lines=1):
        base.make(name)


def test_the_command_ends_with_2(tmp_path):
    code = (
        "import sys; sys.modules['gym_pusht'] = None\n"
        "from wmjax import door; from wmjax.data.__main__ import run\n"
        "sys.argv += ['record', sys.argv[1], '--env=gym_pusht/PushT-v0', '--policy=random']\n"
        "del sys.argv[1]\n"
        "door.run_and_exit(run, '')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT
    )
    assert (found.returncode, found.stdout, len(found.stderr.splitlines())) == (2, "", 1)
    says(found.stderr, "gym_pusht/PushT-v0", "--extra sim")
    assert not (tmp_path / "out").exists()


@each
def test_an_adapter_loads_its_own_simulator_only(name):
    others = {"gym_pusht", "gym_aloha", "stable_worldmodel", "torch"} - {MODULES[name]}
    code = (
        f"import sys; from wmjax.envs.base import make; env = make({name!r}, size=32)\n"
        f"print(sorted({others} & set(sys.modules)), env.picture().shape)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert found.stdout == "[] (32, 32, 3)\n"


@each
def test_a_state_goes_in_and_comes_out_and_leads_to_the_same(name):
    """A state has 32 bits and no memory of contacts: in a collision the difference grows."""
    env, drift = base.make(name, size=96), []
    assert len(env.state) == len(env.robot_names) + len(env.world_names)
    places = slice(5 if "PushT" in name else len(env.robot_names) + 7)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        env.reset(rng)
        actions = [env.random(rng) for _ in range(40)]
        assert np.all((env.lowest <= actions) & (actions <= env.highest))
        played = play(env, actions[:15])
        picture, rest = env.picture(), play(env, actions[15:])
        env.set_state(played[-1])
        np.testing.assert_array_equal(env.state, played[-1])
        assert (env.picture().shape, env.picture().dtype) == ((96, 96, 3), np.uint8)
        assert np.mean(env.picture() != picture) < 1e-3
        first = play(env, actions[15:])
        drift.append(np.abs(first - rest)[[1, -1], places].max(1))
        env.set_state(played[-1])
        np.testing.assert_array_equal(play(env, actions[15:]), first)
        env.reset(np.random.default_rng(seed))
        np.testing.assert_array_equal(play(env, actions[:15]), played)
    one, last = np.array(drift).T  # pixels of 512; radians and metres
    print(f"{name}: apart after 1 step at most {one.max():.2g}, 25 steps {np.sort(last)}")
    assert np.max(one) < (1 if "PushT" in name else 1e-2)
    assert np.median(last) < 1e-2


@each
def test_the_action_that_stays_in_place(name):
    env = base.make(name, size=32)
    env.reset(np.random.default_rng(0))
    start, own = env.state, len(env.robot_names)
    for _ in range(25):
        env.step(env.still())
    tolerance = 1 if "PushT" in name else 0.1
    np.testing.assert_allclose(env.state[:own], start[:own], atol=tolerance)


@pytest.mark.parametrize("name", [PUSHT])
def test_states_and_success_of_pusht_are_theirs(name):
    from gym_pusht.envs.pusht import PushTEnv

    env, other, found = base.make(name, size=96), PushTEnv(obs_type="state"), []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        env.reset(np.random.default_rng(seed))
        other.reset(seed=int(np.random.default_rng(seed).integers(2**31)))
        for _ in range(50):
            action = env.random(rng).astype(np.float32)
            env.step(action)
            numbers, _, _, _, info = other.step(action.astype(np.float64))
            np.testing.assert_array_equal(env.state[:5], numbers.astype(np.float32))
            assert env.reached() == info["is_success"]
    goal = env.state * 0  # the T's pose of the simulator, and the disc far from it
    goal[:5] = 20, 20, *other.goal_pose
    for _ in range(300):
        near = goal.copy()
        near[2:5] += rng.normal(0, 1, 3) * [4, 4, 0.04] * rng.uniform(0, 2)
        env.set_state(near)
        before = env.reached()
        found.append((before, bool(env._simulator._get_coverage() > 0.95)))
        env.set_goal(near)  # any state can be the goal
        assert env.reached()
        assert env.apart(near, goal) == pytest.approx(np.hypot(*(near - goal)[2:4]))
        env.set_goal(goal)
    assert all(ours == theirs for ours, theirs in found)
    assert 30 < sum(ours for ours, _ in found) < 270


@pytest.mark.parametrize("name", [CUBE, INSERTION])
def test_states_and_success_of_aloha_are_theirs(name):
    from gym_aloha.env import AlohaEnv

    env = base.make(name, size=32)
    task = "insertion" if "Insertion" in name else "transfer_cube"
    other = AlohaEnv(task, obs_type="pixels_agent_pos")
    other._env.task.get_observation = lambda physics: {  # without its pictures, which are slow
        "qpos": other._env.task.get_qpos(physics),
        "images": {"top": np.zeros(1)},
    }
    for seed in range(5):
        rng = np.random.default_rng(seed)
        env.reset(np.random.default_rng(seed))
        other.reset(seed=int(np.random.default_rng(seed).integers(2**32)))
        for _ in range(50):
            action = env.random(rng).astype(np.float32)
            env.step(action)
            numbers, _, _, _, info = other.step(action.astype(np.float64))
            np.testing.assert_array_equal(env.state[:14], numbers["agent_pos"].astype(np.float32))
            np.testing.assert_array_equal(
                env.state[14 : 14 + other._env.physics.model.nq - 16],
                other._env.physics.data.qpos[16:].astype(np.float32),
            )
            assert env.reached() == info["is_success"]
    state = env.state
    env.set_goal(state)
    assert env.reached()
    moved = state.copy()
    moved[15] += 0.019
    assert env.apart(state, moved) == pytest.approx(0.019, abs=1e-6)
    env.set_goal(moved)
    assert env.reached()
    moved[15] += 0.002
    env.set_goal(moved)
    assert not env.reached()


@needs_shared
@pytest.mark.parametrize(
    ("name", "folder", "successes"),
    [
        pytest.param(*PUSHT.values, "pusht_explore_v3", 0, marks=PUSHT.marks),
        pytest.param(*CUBE.values, "aloha_sim_transfer_v3", 200, marks=CUBE.marks),
    ],
)
def test_a_recording_of_others_is_played_again(name, folder, successes):
    """From its first state, its actions lead to its states and successes."""
    path = sorted((SHARED / folder / "data").rglob("*.parquet"))[0]
    table = {key: np.array(column) for key, column in pq.read_table(path).to_pydict().items()}
    state = np.hstack([table["observation.state"], table["observation.environment_state"]])
    width, env, found, same = state.shape[1], base.make(name, size=32), 0, []
    for episode in range(4):
        (rows,) = np.nonzero(table["episode_index"] == episode)
        env.reset(np.random.default_rng(0))  # at rest
        start = env.state
        start[:width] = state[rows[0]]
        env.set_state(start)
        for row in rows[:-1]:
            env.step(table["action"][row])
            np.testing.assert_allclose(env.state[:width], state[row + 1], atol=0.01)
            same.append(env.reached() == table["next.success"][row].item())
            found += env.reached()
    print(f"{name}: {found} successes, {np.mean(same):.2%} as recorded")
    assert found >= successes
    assert np.mean(same) > 0.99


@each
def test_a_recording_is_sound_and_a_seed_repeats_it(name, tmp_path):
    for folder in ("one", "two"):
        record(tmp_path / folder, env=name, policy="random", episodes=2, steps=20, size=96)
    findings, looked_at = check(tmp_path / "one", decode=True)
    assert (findings, "2 episodes" in looked_at) == ([], True)
    one, two = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert len(one) > 4
    assert one == two
    refused("--policy=expert", "random")(record)(
        tmp_path / "three", env=name, policy="expert", episodes=1
    )


@pytest.mark.parametrize("name", [CUBE])
def test_what_cannot_draw_is_named(name):
    code = f"from wmjax.envs.base import make; make({name!r})"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MUJOCO_GL": "paper"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    says(found.stderr.splitlines()[-1], "MUJOCO_GL=paper", "egl")


@pytest.mark.parametrize("name", [CUBE])
def test_physics_that_break_are_named(name):
    env = base.make(name, size=32)
    with refused("TransferCube", "MuJoCo", lines=1):
        for seed in range(10):
            rng = np.random.default_rng(seed)
            env.reset(rng)
            for _ in range(300):
                env.step(rng.uniform(env.lowest, env.highest))
