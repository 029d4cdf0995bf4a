"""How often plans reach their goal in a simulator: closed loop, beside simple policies.

The protocol of stable-worldmodel: a start and a goal are two states of a held-out episode, so many
steps apart; twice as many steps are allowed; the goal counts at any step. The pictures of start and
goal are the recorded ones. Starts that count as the goal already are left out. The stricter rule of
CLEAR-LeWM judges the same episodes. Beside the plans act: the recorded actions, which show what is
possible, the simulator's random policy, and the action that stays in place.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from wmjax.actor import Actor
from wmjax.data.media.encode import write_video
from wmjax.data.media.transforms import FULL_BOX, centre_cropped, crop_and_scale, frame_size
from wmjax.envs.base import make
from wmjax.envs.pool import Simulators
from wmjax.errors import UserError, check_above
from wmjax.evals import Context, Report, Unavailable
from wmjax.evals.table import RATES, SIMPLE, rates
from wmjax.models.acting import ActingModel
from wmjax.planning.policy import Policy
from wmjax.run.console import say
from wmjax.step import TrainState

SEED = 42  # of the first choice of starts, as in the protocol
SHOWN, KEPT = 8, 24  # episodes of a video, and of those that they are chosen from
SOUND = 80  # % that the recorded actions reach, where the data is of the simulator
STATE, WORLD = "observation.state", "observation.environment_state"
TITLES = {"planned": "planned", **SIMPLE}


class Trial(NamedTuple):
    """The episodes of one goal and seed: reach `goal_NS` from `start_NS`, states of a clip each.

    picture_N2HWC: the recorded ones, of start and goal. solved: starts that were left out because
    they count as the goal. familiar: starts in episodes that begin as a training episode does.
    strict_N: starts that count as the goal by the stricter rule, which leaves them out.
    """

    goal: int
    seed: int
    clips: list[int]
    start_NS: np.ndarray
    goal_NS: np.ndarray
    picture_N2HWC: np.ndarray
    solved: int
    familiar: int
    strict_N: np.ndarray


# Who reached the goal, by the usual and the stricter rule; None: it was not judged.
Outcome = tuple[np.ndarray, np.ndarray | None]
# (the simulators, or what stands for them, step) -> an action for each, (episodes, A)
Act = Callable[[Any, int], np.ndarray]


class ClosedLoop:
    """The evaluator of eval.env; `closed_loop` in eval.evaluators."""

    name = "closed_loop"  # of its figures, its entry in evals.jsonl and its folder of videos
    about: Mapping[str, Any] = {}  # more for the entry

    def __init__(self, context: Context) -> None:
        settings, blueprint = context.config["eval"], context.steps.blueprint
        self.every = settings["probe_every"]
        if not settings["env"]:
            raise Unavailable
        if not issubclass(blueprint.family, ActingModel):
            raise UserError(f"eval.env={settings['env']!r}: wanted a model that acts, as lewm")
        if jax.process_count() > 1:
            raise Unavailable("a simulator is played in runs of one process: use --mode=eval")
        for key in ("env_episodes", "env_goal", "env_goals", "env_seeds"):
            check_above(f"eval.{key}", settings[key])
        if (ends := context.config["data"]["ends"]) != "drop":
            raise UserError(
                f"data.ends={ends!r}: wanted 'drop' with eval.env, whose goals are a number of "
                "recorded steps away"
            )
        self._name, self._count = settings["env"], settings["env_episodes"]
        self._plan, self._workdir = settings["env_plan"], context.workdir
        self._processes = context.workers
        self._actor = Actor(
            str(context.workdir),
            blueprint,
            lambda weights: blueprint.join(*weights),
            context.sources["train"].recordings(),
            centre_cropped,
        )
        # What does not fit shows here, before training.
        self._actor.settings(self._plan)
        stride, first = blueprint.spec.stride, settings["env_goal"]
        if first % stride:
            raise UserError(
                f"eval.env_goal={first}: wanted a multiple of {stride}, the recorded frames "
                "between two of a clip"
            )
        self._env = make(self._name, "eval.env", size=32)
        self._held_out = context.sources["validation"]
        self._known = set(context.sources["train"].beginnings().values())
        self._trials = [
            self._choose(first * (far + 1), SEED + number)
            for far in range(settings["env_goals"])
            for number in range(settings["env_seeds"])
        ]
        # By (goal, seed) and policy; played once, because they do not depend on the state.
        self._simple: dict[tuple[int, int], dict[str, Outcome]] = {}

    def _clips(self, goal: int) -> Any:
        """Return the held-out clips that reach from a start to a goal."""
        return self._held_out.of_frames(goal // self._held_out.stride + 1)

    def _choose(self, goal: int, seed: int) -> Trial:
        """Return the episodes of a goal and a seed, always the same."""
        env, source, stride = self._env, self._clips(goal), self._held_out.stride
        wanted = {STATE: len(env.robot_names), WORLD: len(env.world_names)}
        for feature, numbers in wanted.items():
            found = source.label_sizes.get(feature, 0)
            if numbers and found != numbers:
                raise UserError(
                    f"eval.env={self._name!r}: its {feature} has {numbers} numbers, the data "
                    f"{found}; wanted a recording of this simulator, and eval.labels='auto'"
                )
        if source.frames <= goal // stride:
            raise UserError(
                f"eval.env_goal: a goal {goal} steps ahead; half of the held-out episodes hold no "
                f"clip of more than {(source.frames - 1) * stride} steps: wanted a nearer goal"
            )
        beginnings, solved = source.beginnings(), 0
        picked: list[tuple] = []
        for index in np.random.default_rng(seed).permutation(len(source)).tolist():
            episode, labels = source.labels(*source.locate(index))
            state_TS = np.concatenate([labels[name] for name in wanted if wanted[name]], axis=1)
            start, end = state_TS[0], state_TS[goal // stride]
            env.set_goal(end)
            env.set_state(start)
            if env.reached():
                solved += 1
                continue
            familiar = beginnings.get(episode) in self._known
            picked.append((index, start, end, familiar, env.reached_strictly()))
            if len(picked) == self._count:
                clips, starts, goals, known, strict = zip(*picked, strict=True)
                pictures = np.stack([self._ends(source[clip], goal // stride) for clip in clips])
                shown = np.stack(starts), np.stack(goals), pictures
                return Trial(goal, seed, [*clips], *shown, solved, sum(known), np.array(strict))
        raise UserError(
            f"eval.env_episodes={self._count}: held-out episodes have {len(picked)} starts whose "
            f"goal, {goal} steps later, is another place"
        )

    def _ends(self, clip: Mapping[str, Any], goal: int) -> np.ndarray:
        """Return the first frame of a clip and its frame `goal`, uint8 (2, size, size, 3)."""
        frames = clip["frames_VT"][0]
        height, width = frame_size(frames[0])
        if height != width:
            found = f"found {height} x {width}"
            raise UserError(f"eval.env={self._name!r}: wanted square pictures, {found}")
        return crop_and_scale((frames[0], frames[goal]), FULL_BOX, height, width)

    def _open(self) -> contextlib.AbstractContextManager[Any]:
        """Return the simulators, with pictures of the recorded size."""
        size = self._trials[0].picture_N2HWC.shape[2]
        processes = self._processes
        return contextlib.closing(
            Simulators(self._name, "eval.env", size=size, count=self._count, processes=processes)
        )

    def __call__(self, step: int, state: TrainState) -> Report:
        trials, weights = self._trials, (state.params, state.frozen, state.target)
        say(f"{self.name}: {len(trials)} x {self._count} episodes of {self._name} ...")
        with self._open() as envs:
            played = [self._evaluate(envs, trial, weights, step) for trial in trials]
        row: dict[str, float] = {}
        texts = []
        for goal in dict.fromkeys(trial.goal for trial in trials):
            found, text = self._summary(goal, [each for each in played if each["goal"] == goal])
            prefix = f"{self.name}/" if goal == trials[0].goal else f"{self.name}/{goal}/"
            row |= {prefix + name: rate for name, rate in found.items()}
            texts.append(text)
        settings = dataclasses.asdict(self._actor.settings(self._plan))
        entry = {"env": self._name, "plan": self._plan, "settings": settings, **self.about}
        return Report(row, "\n".join(texts), entry={self.name: entry | {"trials": played}})

    def _evaluate(self, envs: Any, trial: Trial, weights: Any, step: int) -> dict[str, Any]:
        """Play a trial by every policy; return it as evals.jsonl has it: 1 for a goal reached."""
        key = trial.goal, trial.seed
        if key not in self._simple:
            rng = np.random.default_rng(trial.seed)
            action_TNA = self._recorded(trial)

            def recorded(envs: Any, t: int) -> np.ndarray:
                return action_TNA[t] if t < trial.goal else envs.still()

            def random(*_: Any) -> np.ndarray:
                return np.stack([self._env.random(rng) for _ in range(self._count)])

            self._simple[key] = {
                "recorded": self._play(envs, trial, recorded),
                "random": self._play(envs, trial, random),
                "still": self._play(envs, trial, lambda envs, _: envs.still()),
            }
        seen: list[np.ndarray] | None = [] if trial.seed == SEED else None
        planned = self._play(envs, trial, self._planned(trial, weights), seen)
        if seen:
            self._show(trial, planned[0], seen, f"{step}_{trial.goal}.mp4")
        found = {"planned": planned, **self._simple[key]}
        ways = list(zip(trial.start_NS, trial.goal_NS, strict=True))
        return {
            "goal": trial.goal,
            "seed": trial.seed,
            "solved": trial.solved,
            "familiar": trial.familiar,
            "clips": trial.clips,
            "apart": [round(self._env.apart(*way), 3) for way in ways],
            "turned": [round(self._env.turned(*way), 3) for way in ways],
            "strict_at_start": trial.strict_N.astype(int).tolist(),
            "official": {name: usual.astype(int).tolist() for name, (usual, _) in found.items()},
            "strict": {
                name: strict.astype(int).tolist()
                for name, (_, strict) in found.items()
                if strict is not None
            },
        }

    def _recorded(self, trial: Trial) -> np.ndarray:
        """Return the recorded actions from start to goal, (steps, episodes, A)."""
        source = self._clips(trial.goal)
        clips = (source.read(clip, lambda frame: frame)["action_TPA"] for clip in trial.clips)
        rows = [action_TPA.reshape(-1, action_TPA.shape[-1])[: trial.goal] for action_TPA in clips]
        return np.stack(rows, axis=1)

    def _policy(self, weights: Any, goals: np.ndarray, seed: int) -> Policy:
        """Return a policy that plans for all episodes together toward pictures of their goals."""
        name, shown = self._held_out.datasets[0].name, {self._env.camera: goals}
        policy = self._actor.policy(weights, shown, self._plan, name, "recorded", seed)
        policy.check(self._env.fps)
        return policy

    def _planned(self, trial: Trial, weights: Any) -> Act:
        """Return a function that plans."""
        start_NHWC, goal_NHWC = np.moveaxis(trial.picture_N2HWC, 1, 0)
        policy = self._policy(weights, goal_NHWC, trial.seed)
        everyone, own = np.ones(self._count, bool), len(self._env.robot_names)

        def act(envs: Simulators, t: int) -> np.ndarray:
            if not policy.due:
                return policy.act(None)
            pictures = envs.pictures(everyone) if t else start_NHWC
            return policy.act({self._env.camera: pictures, "state": envs.states()[:, :own]})

        return act

    def _play(
        self, envs: Any, trial: Trial, act: Act, seen: list[np.ndarray] | None = None
    ) -> Outcome:
        """Return which episodes reached their goal; seen: gets the pictures of the first."""
        envs.put(trial.start_NS, trial.goal_NS)
        reached, strictly = np.zeros((2, self._count), bool)
        held = np.zeros(self._count, int)  # steps in a row
        for t in tqdm(range(2 * trial.goal), unit="step", leave=False, disable=None):
            if seen is not None:
                first = np.arange(self._count) < KEPT
                seen.append(envs.pictures(first) if t else trial.picture_N2HWC[:KEPT, 0])
            usual, strict = envs.step(act(envs, t))
            held = np.where(strict, held + 1, 0)
            reached |= usual
            strictly |= held >= self._env.strict_steps
        return reached, strictly

    def _summary(self, goal: int, trials: list[dict]) -> tuple[dict[str, float], str]:
        """Return rates by name in % and a table for the console, over all seeds of a goal."""
        count, unjudged = self._count * len(trials), sum(sum(t["strict_at_start"]) for t in trials)
        found = {
            name: {key: each["mean"] for key, each in rates(trials, policy=name).items()}
            for name in TITLES
        }
        lines = [
            f"{self._name}: {count} goals {goal} steps ahead, {2 * goal} steps allowed, plan "
            f"{self._plan}",
            f"  {'reached, %':17}" + "".join(f"{column:>9}" for column in RATES),
        ]
        for name, columns in found.items():
            shown = (f"{columns[key]:9.0f}" if key in columns else f"{'':9}" for key in RATES)
            lines.append(f"  {TITLES[name]:17}" + "".join(shown))
        row = {name: columns["official"] for name, columns in found.items()}
        if row["recorded"] < SOUND:
            lines.append(
                f"  warning: the recorded actions reach {row['recorded']:.0f} %: wanted a "
                f"recording of {self._name} and its rate"
            )
        if familiar := sum(trial["familiar"] for trial in trials):
            lines.append(
                f"  warning: {familiar} of {count} episodes begin as a training episode does"
            )
        share, solved = row["planned"] / 100, sum(trial["solved"] for trial in trials)
        lines += [
            f"  standard error of the first: {100 * np.sqrt(share * (1 - share) / count):.1f}",
            f"  left out, because at the goal from the start: {solved}",
        ]
        if "strict" in found["planned"]:
            row["strict"] = found["planned"]["strict"]
            lines[-1] += f"; of strict: {unjudged}"
        return row, "\n".join(lines)

    def _show(
        self, trial: Trial, reached: np.ndarray, pictures: list[np.ndarray], name: str
    ) -> None:
        """Write a video of some episodes, half of them failures where there are as many.

        Each column is an episode: what the camera sees above, the goal below.
        """
        missed, done = (np.flatnonzero(reached[:KEPT] == which) for which in (False, True))
        fails = missed[: max(SHOWN // 2, SHOWN - len(done))]
        chosen = [*done[: SHOWN - len(fails)], *fails]
        goals = trial.picture_N2HWC[chosen, 1]

        def frame(seen: np.ndarray) -> np.ndarray:
            picture = np.concatenate([np.concatenate(row, axis=1) for row in (seen[chosen], goals)])
            return picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2]

        folder = Path(self._workdir) / self.name
        folder.mkdir(exist_ok=True)
        fps = Fraction(self._env.fps).limit_denominator(1000)
        write_video(folder / name, map(frame, pictures), fps)
