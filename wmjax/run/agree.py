"""Processes of one run agree before the first step; a resumed run agrees with its checkpoint.

Compared are the program, the configuration, the data and the workdir. Processes that differ would
hang in a collective or in the first save, or train on other clips than the run says.
"""

import functools
import hashlib
import itertools
import platform
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax

from wmjax import __version__
from wmjax.data.source import Source
from wmjax.errors import ExitCode, UserError
from wmjax.run import coordination
from wmjax.run.console import say
from wmjax.run.exits import exit_now
from wmjax.run.files import from_json, to_json

ANSWER_S = 3600.0  # time for all processes to come here; one may still download a dataset
SEEN_S = 10.0  # time for a file to appear on another host
_met = itertools.count()


def on_program(config: Mapping[str, Any]) -> None:
    """Raise UserError unless all processes have the same code, libraries and configuration."""
    program = {"wmjax": __version__, "the source files of wmjax": source_hash()}
    same(program | versions() | dict(_leaves(config)))


def on_data(sources: Mapping[str, Source]) -> None:
    """Raise UserError unless all processes have opened the same data; sources: by split."""
    if coordination.alone():  # a fingerprint takes time
        return
    values: dict[str, Any] = {}
    for split, source in sources.items():
        # The dropped episodes first: they change the rest.
        values[f"data.on_error: dropped {split} episodes"] = [*source.dropped]
        values |= {f"data: {k} of {split}": v for k, v in source.fingerprint().items()}
        values[f"data: {split} clips"] = len(source)
    same(values)


def on_workdir(workdir: Path) -> None:
    """Raise UserError unless all processes see the same workdir."""
    if coordination.alone():
        return
    name, first = f"workdir/{next(_met)}", coordination.index() == 0
    if first:
        # A name that no host has looked up yet: network disks remember that a file is absent.
        token = workdir / f".seen-{time.time_ns():x}"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            raise UserError(f"--workdir: cannot write {workdir}: {error.strerror}") from None
        coordination.tell(name, token.name)
    else:
        token, deadline = workdir / _answer(name), time.monotonic() + SEEN_S
        while not token.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"--workdir={workdir}: a file that process 0 wrote there is not seen by "
                    f"process {coordination.index()} after {SEEN_S:g} s: wanted a disk that all "
                    "hosts share"
                )
            time.sleep(0.2)
    _meet(name)
    if first:
        token.unlink(missing_ok=True)


def same(values: Mapping[str, Any]) -> None:
    """Raise UserError for the first value that differs from process 0's; then run.peers ends all.

    Returns once all processes have compared. values: of JSON types, by what to call them.
    """
    if coordination.alone():
        return
    name, index = f"agree/{next(_met)}", coordination.index()
    mine = {key: to_json(value, sort_keys=True) for key, value in values.items()}
    if index == 0:
        coordination.tell(name, to_json(mine))
    wanted = from_json(_answer(name))
    for key in wanted | mine:
        if wanted.get(key) != mine.get(key):
            (theirs, ours) = (_short(each.get(key, "absent")) for each in (wanted, mine))
            raise UserError(
                f"{key}: {theirs} in process 0, {ours} in process {index}: wanted the same in "
                "all processes of the run"
            )
    _meet(name)


def check_same(meta: dict[str, Any], data: Mapping[str, Any], *, strict: bool) -> None:
    """Warn of what changed in data and libraries since the checkpoint; strict: raise UserError.

    data: the fingerprint of the run's data. The first checkpoints of wmjax say nothing of either.
    """
    for what, now, follows in (
        ("data", data, "an unbroken run would get other clips"),
        ("versions", versions(), "the last bits may differ from an unbroken run's"),
    ):
        was = meta.get(what, now)
        names = dict.fromkeys([*was, *now])
        changed = [n for n in names if was.get(n) != now.get(n)]
        if not changed:
            continue
        lines = [_change(name, was.get(name, "none"), now.get(name, "none")) for name in changed]
        if strict:
            text = "; ".join(lines)
            raise UserError(f"checkpoint.strict=True: {what}: {text}: wanted the same")
        begin = f"warning: other {what} than when the checkpoint was saved: {follows}"
        say("\n  ".join([begin, *lines]))


def _change(name: str, was: Any, now: Any) -> str:
    """Describe a change of a value; of a hash only that there is one."""
    before, hashed, what = name.partition("hash of ")
    return f"{before}{what}: not the same" if hashed else f"{name}: {now}, was {was}"


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers, by name."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "grain", "av")
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names}


@functools.cache
def source_hash() -> str:
    """Return a hash of wmjax's source files, by their names and contents."""
    package = Path(__file__).parents[1]
    hashed = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return hashed.hexdigest()[:12]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _answer(name: str) -> str:
    try:
        return coordination.wait_told(name, ANSWER_S)
    except jax.errors.JaxRuntimeError:
        _no_answer()


def _meet(name: str) -> None:
    try:
        coordination.meet(name, ANSWER_S)
    except jax.errors.JaxRuntimeError:
        _no_answer()


def _no_answer() -> NoReturn:
    text = (
        f"error: a process of the run did not answer within {ANSWER_S:g} s, before the first step"
    )
    exit_now(ExitCode.PEER_DIED, text)
