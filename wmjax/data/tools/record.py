"""`python -m wmjax.data record`: play episodes in a simulator and write them as LeRobot v3.0.

Each episode depends on (seed, its number) only, so a dataset is the same however many processes
write it. All have the same length. Files hold FILE episodes each and appear whole; meta/info.json
comes last. So the same command again resumes, and one with more episodes adds them.
"""

import itertools
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wmjax.data.lerobot.info import number_widths
from wmjax.data.media.encode import describe_h264, to_png, write_video
from wmjax.data.stats import summarize
from wmjax.data.tools.jobs import claim, placed, run
from wmjax.envs.base import Environment, make
from wmjax.errors import UserError, check_choice, check_range
from wmjax.run.files import to_json

FILE = 50  # episodes
_MARK = Path("meta/record.json")  # the settings of a recording that was begun
_GOP, _CRF = 2, 15
_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_STATE, _WORLD = "observation.state", "observation.environment_state"
_NONE = np.zeros(0, np.uint8)  # a picture that was written already
_COUNTERS = ("frame_index", "episode_index", "index", "task_index")


class Job(NamedTuple):
    """One file of episodes, first to last; number: of the file."""

    out: Path
    number: int
    env: str
    policy: str
    first: int
    last: int
    steps: int
    size: int
    seed: int
    images: bool


class Step(NamedTuple):
    """What is recorded of a step; reached: whether the action led to the goal."""

    picture: np.ndarray
    state: np.ndarray
    action: np.ndarray
    reached: bool


def record(
    out: Path,
    *,
    env: str,
    policy: str,
    episodes: int,
    steps: int = 100,
    size: int = 96,
    seed: int = 0,
    images: bool = False,
    workers: int = 1,
) -> None:
    """Write `episodes` episodes of `steps` steps to the folder `out`.

    env: a name of envs.base. policy: random or expert, both the environment's own.
    size: height and width of the pictures. images: True stores PNG in the tables, exact to the bit;
    False: H.264 video. Raises UserError for wrong settings, and for a folder of other ones.
    """
    out = out.expanduser().absolute()
    check_choice("--policy", policy, ("random", "expert"))
    check_range("--episodes", episodes, 1, 10**7)
    check_range("--steps", steps, 2, 10**6)
    check_range("--size", size, 8, 2**13)
    check_range("--workers", workers, 1, 2**10)
    if size % 2 and not images:
        raise UserError(f"--size={size}: wanted an even number for video, or --images")
    settings = {
        **{"env": env, "policy": policy, "steps": steps},
        **{"size": size, "seed": seed, "images": images},
    }
    simulator = make(env, size=size)
    _play(simulator, policy, seed, 0)  # what is wrong with the names shows here
    claim(out, _MARK, settings)
    jobs = [
        Job(
            *(out, first // FILE, env, policy, first, min(first + FILE, episodes)),
            *(steps, size, seed, images),
        )
        for first in range(0, episodes, FILE)
    ]
    total = _episodes_in(out)
    if total > episodes:
        raise UserError(f"--episodes={episodes}: {out} has {total}; wanted {total} or more")
    waiting = [job for job in jobs if not _is_done(job, simulator)]
    run(_try, waiting, total=len(jobs), workers=workers, unit="file")
    _write_meta(simulator, jobs)


def _features(env: Environment, size: int, images: bool) -> dict[str, dict[str, Any]]:
    """Return the features of meta/info.json, in the order of the columns."""
    info = {**describe_h264(size, size, gop=_GOP, crf=_CRF), "video.fps": env.fps}
    picture = {
        "dtype": "image" if images else "video",
        "shape": [size, size, 3],
        "names": ["height", "width", "channels"],
        **({} if images else {"info": {**info, "video.channels": 3, "is_depth_map": False}}),
    }
    numbers = {_STATE: env.robot_names, _WORLD: env.world_names, "action": env.action_names}
    return {
        env.camera: picture,
        **{
            name: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
            for name, names in numbers.items()
            if names
        },
        "next.success": {"dtype": "bool", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{name: {"dtype": "int64", "shape": [1], "names": None} for name in _COUNTERS},
    }


def _play(env: Environment, policy: str, seed: int, episode: int) -> Iterator[Step]:
    """Return the steps of an episode, without end."""
    rng = np.random.default_rng((seed, episode))
    env.reset(rng)
    act = env.expert(rng) if policy == "expert" else lambda: env.random(rng)

    def steps() -> Iterator[Step]:
        while True:
            picture, state = env.picture(), env.state
            action = np.asarray(act(), np.float32)
            env.step(action)
            yield Step(picture, state, action, env.reached())

    return steps()


def _try(job: Job) -> str:
    """Write one file of episodes; return the error, or ''."""
    try:
        _write_file(job)
    except UserError as error:
        return str(error)
    except av.FFmpegError as error:
        return f"{_paths(job, '')[0]}: {error.strerror}"
    return ""


def _write_file(job: Job) -> None:
    env = make(job.env, size=job.size)
    table, video = _paths(job, env.camera)
    rows: list[Step] = []
    encoded: list[bytes] = []

    def pictures() -> Iterator[np.ndarray]:
        for episode in range(job.first, job.last):
            played = _play(env, job.policy, job.seed, episode)
            for step in itertools.islice(played, job.steps):
                rows.append(step._replace(picture=_NONE))
                yield step.picture

    if job.images:
        encoded = [to_png(picture) for picture in pictures()]
    else:
        with placed(video) as part:
            write_video(part, pictures(), Fraction(env.fps).limit_denominator(1000), gop=_GOP)
    with placed(table) as part:
        pq.write_table(_table(job, env, rows, encoded), part)


def _table(job: Job, env: Environment, rows: list[Step], png: list[bytes]) -> pa.Table:
    _, state, action, reached = (np.array(column) for column in zip(*rows, strict=True))
    frame = np.arange(len(rows)) % job.steps
    own = len(env.robot_names)

    def numbers(values: np.ndarray) -> pa.Array:
        flat = np.ascontiguousarray(values, np.float32)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])

    columns: dict[str, Any] = {}
    if png:
        columns[env.camera] = pa.array([{"bytes": each, "path": None} for each in png], _PICTURE)
    columns[_STATE] = numbers(state[:, :own])
    if env.world_names:
        columns[_WORLD] = numbers(state[:, own:])
    columns |= {
        "action": numbers(action),
        "next.success": pa.array(reached),
        "next.done": pa.array(frame == job.steps - 1),
        "timestamp": pa.array((frame / env.fps).astype(np.float32)),
        "frame_index": pa.array(frame),
        "episode_index": pa.array(job.first + np.arange(len(rows)) // job.steps),
        "index": pa.array(job.first * job.steps + np.arange(len(rows))),
        "task_index": pa.array(np.zeros(len(rows), np.int64)),
    }
    return pa.table(columns)


def _place(job: Job) -> dict[str, int]:
    chunk, file = divmod(job.number, 1000)
    return {"chunk_index": chunk, "file_index": file}


def _paths(job: Job, camera: str) -> tuple[Path, Path]:
    """Return the table and the video of a file of episodes."""
    place = _place(job)
    return job.out / _DATA.format(**place), job.out / _VIDEO.format(video_key=camera, **place)


def _is_done(job: Job, env: Environment) -> bool:
    table, video = _paths(job, env.camera)
    if not table.exists() or not (job.images or video.exists()):
        return False
    return pq.read_metadata(table).num_rows == (job.last - job.first) * job.steps


def _episodes_in(out: Path) -> int:
    """Return the episodes of a recording that is done; 0: it is not."""
    path = out / "meta/info.json"
    return int(json.loads(path.read_text())["total_episodes"]) if path.exists() else 0


def _write_meta(env: Environment, jobs: list[Job]) -> None:
    """Write the metadata, meta/info.json last."""
    job, episodes = jobs[0], jobs[-1].last
    out, steps = job.out, job.steps
    features = _features(env, job.size, job.images)
    with placed(out / "meta/tasks.parquet") as part:
        pq.write_table(_tasks(env.task), part)
    with placed(out / "meta/episodes/chunk-000/file-000.parquet") as part:
        pq.write_table(_episode_table(env, jobs), part)
    names = [name for name in number_widths(features) if name not in ("next.success", "next.done")]
    tables = [pq.read_table(_paths(each, env.camera)[0], columns=names) for each in jobs]
    rows = pa.concat_tables(tables)
    stats = {name: _as_lists(summarize(_column(rows[name]))) for name in names}
    stats[env.camera] = _picture_stats(env, job, min(episodes, FILE))
    with placed(out / "meta/stats.json") as part:
        part.write_text(to_json(stats, indent=4))
    info = {
        "codebase_version": "v3.0",
        "robot_type": job.env,
        "total_episodes": episodes,
        "total_frames": episodes * steps,
        "total_tasks": 1,
        "chunks_size": 1000,
        "fps": int(env.fps) if float(env.fps).is_integer() else env.fps,
        "splits": {"train": f"0:{episodes}"},
        "data_path": _DATA,
        "video_path": None if job.images else _VIDEO,
        "features": features,
    }
    with placed(out / "meta/info.json") as part:
        part.write_text(to_json(info, indent=4))


def _tasks(task: str) -> pa.Table:
    """Return the table of tasks, which pandas reads with the task as its index."""
    index = {"index_columns": ["task"], "column_indexes": [], "columns": [], "pandas_version": "2"}
    table = pa.table({"task_index": pa.array([0]), "task": pa.array([task])})
    return table.replace_schema_metadata({"pandas": to_json(index)})


def _episode_table(env: Environment, jobs: list[Job]) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    steps = jobs[0].steps
    for job in jobs:
        for episode in range(job.first, job.last):
            row = {
                "episode_index": episode,
                "tasks": [env.task],
                "length": steps,
                **{f"data/{key}": value for key, value in _place(job).items()},
                "dataset_from_index": episode * steps,
                "dataset_to_index": (episode + 1) * steps,
                **{f"meta/episodes/{key}": 0 for key in ("chunk_index", "file_index")},
            }
            if not job.images:
                first = (episode - job.first) * steps
                row |= {f"videos/{env.camera}/{key}": at for key, at in _place(job).items()}
                row |= {
                    f"videos/{env.camera}/from_timestamp": first / env.fps,
                    f"videos/{env.camera}/to_timestamp": (first + steps) / env.fps,
                }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return pa.table(columns)


def _column(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as rows of numbers."""
    values = column.combine_chunks()
    if pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _as_lists(stats: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: value if isinstance(value, list) else [value] for key, value in stats.items()}


def _picture_stats(env: Environment, job: Job, episodes: int) -> dict[str, Any]:
    """Return statistics of the first pictures, in shares of 255, by colour."""
    first = [next(_play(env, job.policy, job.seed, episode)).picture for episode in range(episodes)]
    stats = summarize(np.stack(first).reshape(-1, 3).astype(np.float64) / 255)
    count = episodes * math.prod(first[0].shape[:2])
    columns = {key: [[[x]] for x in stats[key]] for key in ("min", "max", "mean", "std")}
    return columns | {"count": [count]}
