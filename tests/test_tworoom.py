"""TwoRoom: its steps, its picture, its expert; and state by state as stable-worldmodel's own."""

import numpy as np
import pytest

from wmjax.envs import base, tworoom
from wmjax.envs.tworoom import TwoRoom


def walk(room, start, actions):
    room.set_state(np.array(start, np.float32))
    states = []
    for action in actions:
        room.step(np.array(action))
        states.append(room.state)
    return np.array(states)


@pytest.mark.parametrize(
    ("start", "action", "steps", "end"),
    [
        ((60, 112), (1, 0), 1, (65, 112)),
        ((60, 112), (3, -9), 1, (65, 107)),  # clipped
        ((60, 112), (1, 0), 40, (99.5, 112)),  # the inner wall
        ((164, 112), (-1, 0), 40, (124.5, 112)),
        ((60, 49), (1, 0), 40, (203, 49)),  # through the door
        ((60, 112), (-1, -1), 40, (21, 21)),  # a corner
    ],
)
def test_steps(start, action, steps, end):
    assert walk(TwoRoom(), start, [action] * steps)[-1].tolist() == list(end)


def test_a_goal_is_reached_within_its_distance():
    room = TwoRoom()
    room.set_goal(np.array([100.0, 100.0]))
    found = []
    for x in (84.0, 84.5, 115.5, 116.0):
        room.set_state(np.array([x, 100.0]))
        found.append(room.reached())
    assert found == [False, True, True, False]


@pytest.mark.parametrize("size", [224, 96, 64])
def test_a_picture_shows_walls_door_and_dot(size):
    room = TwoRoom(size=size)
    room.set_state(np.array([60.0, 160.0]))
    picture = room.picture()
    assert (picture.shape, picture.dtype) == ((size, size, 3), np.uint8)

    def at(x, y):
        return picture[int(y * size / 224), int(x * size / 224)].tolist()

    red, green, blue = at(60, 160)
    assert red == 255
    assert max(green, blue) < 40
    assert at(112, 160) == [0, 0, 0]
    assert at(112, 49) == [255, 255, 255]
    assert at(180, 40) == [255, 255, 255]


def test_the_way_goes_through_the_door():
    room = TwoRoom()
    near, far = np.array([60.0, 49.0]), np.array([164.0, 49.0])
    assert room.apart(near, far) == pytest.approx(104)
    assert room.apart(np.array([60.0, 200.0]), np.array([164.0, 200.0])) > 300
    assert room.apart(near, near + 3) == pytest.approx(np.sqrt(18))


def test_the_expert_arrives_and_a_seed_repeats_it():
    def episode(seed):
        room, rng = TwoRoom(), np.random.default_rng(seed)
        room.reset(rng)
        act, reached, states = room.expert(rng), 0, []
        for _ in range(200):
            room.step(act())
            reached += room.reached()
            states.append(room.state)
        return reached, np.array(states)

    found = [episode(seed) for seed in range(20)]
    assert sum(reached > 0 for reached, _ in found) >= 17
    both = [len(set(states[:, 0] < tworoom.WALL)) for _, states in found]
    assert sum(rooms == 2 for rooms in both) >= 12
    np.testing.assert_array_equal(episode(3)[1], found[3][1])


def test_names_are_resolved():
    assert isinstance(base.make("tworoom", size=32), TwoRoom)
    assert base.make("wmjax.envs.tworoom:TwoRoom").picture().shape == (224, 224, 3)


@pytest.mark.campaign
def test_states_are_those_of_stable_worldmodel():
    """In an environment with stable-worldmodel: its states and pictures, 100 walks."""
    theirs = pytest.importorskip("stable_worldmodel.envs.two_room.env")
    ours = TwoRoom()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        ours.reset(rng)
        other = theirs.TwoRoomEnv()
        other.reset(seed=seed)
        other._set_state(ours.state)
        for _ in range(100):
            action = rng.uniform(-1.5, 1.5, 2).astype(np.float32)
            ours.step(action)
            other.step(action)
            np.testing.assert_array_equal(ours.state, other.agent_position.numpy())
        np.testing.assert_allclose(ours.picture(), other.render(), atol=1)
