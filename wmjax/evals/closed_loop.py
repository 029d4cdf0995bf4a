"""How often plans reach their goal in a simulator: closed loop, beside simple policies.

The protocol of stable-worldmodel: a start and a goal are two states of a held-out episode, so many
steps apart; twice as many steps are allowed; the goal counts at any step. Starts that count as the
goal already are left out. Beside the plans act: the recorded actions, which show what is possible,
the simulator's random policy, and the action that stays in place.
"""

import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from wmjax.actor import Actor
from wmjax.data.media.encode import write_video
from wmjax.data.media.transforms import centre_cropped, frame_size
from wmjax.envs.base import Environment, make
from wmjax.errors import UserError, check_above
from wmjax.evals import Context, Report, Unavailable
from wmjax.models.acting import ActingModel
from wmjax.run.console import say
from wmjax.step import TrainState

SEED = 42  # of the choice of episodes, as in the protocol
SHOWN, KEPT = 8, 24  # episodes of the video, and of those that they are chosen from
SOUND = 80  # % that the recorded actions reach, where the data is of the simulator
STATE, WORLD = "observation.state", "observation.environment_state"


class Task(NamedTuple):
    """Reach the state `goal` from `start`, both of a clip."""

    clip: int
    start: np.ndarray
    goal: np.ndarray


class ClosedLoop:
    """The evaluator of eval.env; `closed_loop` in eval.evaluators."""

    def __init__(self, context: Context) -> None:
        settings, blueprint = context.config["eval"], context.steps.blueprint
        self.every = settings["probe_every"]
        if not settings["env"]:
            raise Unavailable
        if not issubclass(blueprint.family, ActingModel):
            raise UserError(f"eval.env={settings['env']!r}: wanted a model that acts, as lewm")
        if jax.process_count() > 1:
            raise Unavailable("a simulator is played in runs of one process: use --mode=eval")
        for key in ("env_episodes", "env_goal"):
            check_above(f"eval.{key}", settings[key])
        self._name, self._goal = settings["env"], settings["env_goal"]
        self._count, self._plan = settings["env_episodes"], settings["env_plan"]
        self._workdir, self._seed = context.workdir, context.config["seed"]
        self._actor = Actor(
            str(context.workdir),
            blueprint,
            lambda weights: blueprint.join(*weights),
            context.sources["train"].recordings(),
            centre_cropped,
        )
        # What does not fit shows here, before training.
        self._actor.settings(self._plan)
        stride = blueprint.spec.stride
        if self._goal % stride:
            raise UserError(
                f"eval.env_goal={self._goal}: wanted a multiple of {stride}, the recorded frames "
                "between two of a clip"
            )
        self._source = context.sources["validation"].of_frames(self._goal // stride + 1)
        env = make(self._name, "eval.env", size=32)
        self._tasks = self._choose(env)
        self._simple: dict[str, np.ndarray] = {}

    def _choose(self, env: Environment) -> list[Task]:
        """Return the tasks, always the same."""
        wanted = {STATE: len(env.robot_names), WORLD: len(env.world_names)}
        for feature, numbers in wanted.items():
            found = self._source.label_sizes.get(feature, 0)
            if numbers and found != numbers:
                raise UserError(
                    f"eval.env={self._name!r}: its {feature} has {numbers} numbers, the data "
                    f"{found}; wanted a recording of this simulator, and eval.labels='auto'"
                )
        source, tasks = self._source, []
        for index in np.random.default_rng(SEED).permutation(len(source)).tolist():
            _, labels = source.labels(*source.locate(index))
            state_TS = np.concatenate([labels[name] for name in wanted if wanted[name]], axis=1)
            task = Task(index, state_TS[0], state_TS[self._goal // source.stride])
            env.set_goal(task.goal)
            env.set_state(task.start)
            if not env.reached():
                tasks.append(task)
            if len(tasks) == self._count:
                return tasks
        raise UserError(
            f"eval.env_episodes={self._count}: held-out episodes have {len(tasks)} starts whose "
            f"goal, {self._goal} steps later, is another place"
        )

    @functools.cached_property
    def _environments(self) -> list[Environment]:
        """A simulator for each task, with pictures of the recorded size."""
        height, width = frame_size(self._source[0]["frames_VT"][0][0])
        if height != width:
            found = f"found {height} x {width}"
            raise UserError(f"eval.env={self._name!r}: wanted square pictures, {found}")
        return [make(self._name, "eval.env", size=height) for _ in range(self._count)]

    def _recorded(self, task: Task) -> np.ndarray:
        """Return the actions between start and goal, (steps, A)."""
        action_TPA = self._source.read(task.clip, lambda frame: frame)["action_TPA"]
        return action_TPA.reshape(-1, action_TPA.shape[-1])[: self._goal]

    def __call__(self, step: int, state: TrainState) -> Report:
        say(f"closed loop: {self._count} episodes of {self._name} ...")
        tasks, weights = self._tasks, (state.params, state.frozen, state.target)
        env = self._environments[0]
        if not self._simple:  # played once, because they do not depend on the state
            rng = np.random.default_rng(SEED)
            recorded = np.stack([self._recorded(task) for task in tasks])

            def random(*_: Any) -> np.ndarray:
                return np.stack([env.random(rng) for env in self._environments])

            def still(*_: Any) -> np.ndarray:
                return np.stack([env.still() for env in self._environments])

            self._simple = {
                "recorded": self._play(lambda _, t: recorded[:, t] if t < self._goal else still()),
                "random": self._play(random),
                "still": self._play(still),
            }
        policy = self._policy(weights)
        pictures: list[np.ndarray] = []
        found = {"planned": self._play(policy, pictures), **self._simple}
        self._show(step, found["planned"], pictures)
        apart = np.array([env.apart(task.start, task.goal) for task in tasks])
        rates = {
            f"closed_loop/{name}": 100 * float(reached.mean()) for name, reached in found.items()
        }
        entry = {
            "closed_loop": {
                "env": self._name,
                "plan": self._plan,
                "goal": self._goal,
                "apart": apart.tolist(),
                **{name: reached.tolist() for name, reached in found.items()},
            }
        }
        return Report(rates, self._table(found, apart), entry=entry)

    def _policy(self, weights: Any) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return a function of (pictures, step) that plans for all episodes together."""
        goals = []
        for env, task in zip(self._environments, self._tasks, strict=True):
            env.set_state(task.goal)
            goals.append(env.picture())
        name = self._source.datasets[0].name
        policy = self._actor.policy(
            weights, {env.camera: np.stack(goals)}, self._plan, name, "recorded", self._seed
        )
        policy.check(env.fps)
        own = len(env.robot_names)

        def act(pictures: np.ndarray, _: int) -> np.ndarray:
            states = np.stack([env.state[:own] for env in self._environments])
            return policy.act({env.camera: pictures, "state": states})

        return act

    def _play(
        self,
        act: Callable[[np.ndarray, int], np.ndarray],
        kept: list[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return which episodes reached their goal, (episodes,); kept: gets the first pictures."""
        for env, task in zip(self._environments, self._tasks, strict=True):
            env.set_goal(task.goal)
            env.set_state(task.start)
        reached = np.zeros(self._count, bool)
        for t in tqdm(range(2 * self._goal), unit="step", leave=False, disable=None):
            pictures = np.zeros(0)
            if kept is not None:
                pictures = np.stack([env.picture() for env in self._environments])
                kept.append(pictures[:KEPT])
            action_NA = act(pictures, t)
            for i, env in enumerate(self._environments):
                env.step(action_NA[i])
                reached[i] |= env.reached()
        return reached

    def _table(self, found: Mapping[str, np.ndarray], apart: np.ndarray) -> str:
        """Format rates for the console, by how far the goal is: a third of the tasks each."""
        parts = [np.arange(self._count), *np.array_split(np.argsort(apart), 3)]
        lines = [
            f"{self._name}: {self._count} goals {self._goal} steps ahead, {2 * self._goal} steps "
            f"allowed, plan {self._plan}",
            f"  {'reached, %':17}{'all':>8}{'near':>8}{'middle':>8}{'far':>8}",
        ]
        for name, reached in found.items():
            rates = (f"{100 * reached[part].mean():8.0f}" for part in parts if len(part))
            lines.append(f"  {TITLES[name]:17}" + "".join(rates))
        if (share := 100 * found["recorded"].mean()) < SOUND:
            lines.append(
                f"  warning: the recorded actions reach {share:.0f} %: wanted a recording of "
                f"{self._name} and its rate"
            )
        error = 100 * float(np.std(found["planned"]) / np.sqrt(self._count))
        lines.append(f"  standard error of the first: {error:.1f}")
        return "\n".join(lines)

    def _show(self, step: int, reached: np.ndarray, pictures: list[np.ndarray]) -> None:
        """Write a video of some episodes, half of them failures where there are as many.

        Each column is an episode: what the camera sees above, the goal below.
        """
        missed, done = (np.flatnonzero(reached[:KEPT] == which) for which in (False, True))
        fails = missed[: max(SHOWN // 2, SHOWN - len(done))]
        chosen = [*done[: SHOWN - len(fails)], *fails]
        goals = []
        for i in chosen:
            self._environments[i].set_state(self._tasks[i].goal)
            goals.append(self._environments[i].picture())

        def frame(seen: np.ndarray) -> np.ndarray:
            picture = np.concatenate([np.concatenate(row, axis=1) for row in (seen[chosen], goals)])
            return picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]

        folder = Path(self._workdir) / "closed_loop"
        folder.mkdir(exist_ok=True)
        fps = Fraction(self._environments[0].fps).limit_denominator(1000)
        write_video(folder / f"{step}.mp4", map(frame, pictures), fps)


TITLES = {
    "planned": "planned",
    "recorded": "recorded actions",
    "random": "random actions",
    "still": "no action",
}
