"""Damages datasets at random and reads them: `python tests/damage.py BASE FIRST:END`.

A case is (base, seed). It damages one thing in a copy of the base, then opens and reads the copy as
training does, and checks it. It prints a line when it starts and one when it ends, so that a crash
or a hang is of the last case that started. Imports no jax.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from recordings import reader_of

from wmjax.data.lerobot.native import LeRobotSource
from wmjax.data.skips import Skips
from wmjax.data.tools.check import check
from wmjax.errors import UserError

HANG_S = 60
READS = 4
MEMORY = 8 << 30  # bytes of address space: more fails in this process, not on the machine

STRANGE = [
    *(None, True, False, 0, -1, 1, 2, 10.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**400, -(2**63)),
    *("", "x", "\0", "../../..", "/etc", "a" * 5000, "v3.0", "float32", "video", "0:" + "9" * 99),
    *("{chunk_index}", "{chunk_index.__class__}", "{chunk_index:999999999d}", "{0}", "{x!r}"),
    *([], {}, [1], [None], ["x"], [[1]], {"x": 1}, [2**40, 2**40], [-1, 3], [10**5] * 3, [0]),
]
BYTES = ["flip", "zero", "random", "huge", "huge", "cut", "insert", "repeat", "empty", "other"]
FILES = ["missing", "folder", "link to nothing", "link to itself"]
CASTS = [
    *(pa.string(), pa.float64(), pa.int8(), pa.uint64(), pa.bool_(), pa.decimal128(38, 2)),
    *(pa.list_(pa.int64()), pa.struct({"bytes": pa.binary()}), pa.timestamp("us"), pa.binary()),
]


def damage(root, rng):
    """Damage one thing in the dataset and return what; its files may be hard links."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    path = rng.choice(files)
    kinds = {".json": _edit_json, ".jsonl": _edit_json, ".parquet": _edit_table}
    edit = kinds.get(path.suffix, _edit_bytes)
    # Wrong content of a table or a list finds more faults than wrong bytes.
    how = (edit if rng.random() < 0.6 else _edit_bytes)(path, rng)
    return f"{path.relative_to(root)}: {how}"


def _write(path, data):
    path.unlink()  # it may be a hard link to the base's file
    path.write_bytes(data)


def _edit_bytes(path, rng):
    data = bytearray(path.read_bytes())
    size = len(data)
    # Headers, indices and footers are at both ends.
    at = rng.choice([rng.randrange(size), rng.randrange(min(size, 4096)),
                     size - 1 - rng.randrange(min(size, 4096))])  # fmt: skip
    length = min(rng.choice([1, 1, 4, 8, 100, 4096]), size - at)
    how = rng.choice([*BYTES, *FILES])
    match how:
        case "flip":
            for i in range(at, at + length):
                data[i] ^= 1 << rng.randrange(8)
        case "zero":
            data[at : at + length] = bytes(length)
        case "random":
            data[at : at + length] = rng.randbytes(length)
        case "huge":
            value = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
            data[at : at + 4] = value
        case "cut":
            del data[at:]
        case "insert":
            data[at:at] = rng.randbytes(length)
        case "repeat":
            data[at:at] = data[at : at + length]
        case "empty":
            data.clear()
        case "other":
            others = [p for p in path.parents[1].rglob("*") if p.is_file() and p != path]
            data = rng.choice(others or [path]).read_bytes()
        case _:
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how != "missing":
                path.symlink_to("nothing" if how == "link to nothing" else path.name)
            return how
    _write(path, bytes(data))
    return f"{how} {length} of {size} bytes at {at}"


def _edit_json(path, rng):
    lines = path.suffix == ".jsonl"
    text = path.read_text()
    top = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    holder, key, place = top, None, []
    while isinstance(holder, dict | list) and holder:
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        place.append(key)
        below = holder[key]
        # The keys that decide how to read are near the top.
        if not isinstance(below, dict | list) or not below or rng.random() < 0.35:
            break
        holder = below
    how = rng.choice(["drop", "strange", "strange", "strange", "rename"])
    if how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        new = str(rng.choice(STRANGE))
        holder[new] = holder.pop(key)
        how = f"rename to {new[:40]!r}"
    else:
        holder[key] = rng.choice(STRANGE)
        how = repr(holder[key])[:60]
    text = "\n".join(json.dumps(line) for line in top) if lines else json.dumps(top)
    _write(path, text.encode())
    return f"{place}: {how}"


def _edit_table(path, rng):
    table = pq.read_table(path)
    # Columns with numbers of episodes and files matter most.
    names = table.column_names
    at = names.index(rng.choice([n for n in names if "stats/" not in n]))
    name, column = names[at], table.column(at)
    how = rng.choice(["drop", "twice", "cast", "value", "value", "value", "rows", "none", "all"])
    match how:
        case "drop":
            table = table.remove_column(at)
        case "twice":
            table = table.append_column(name, column)
        case "cast":
            kind = rng.choice(CASTS)
            try:
                column = column.cast(kind)
            except pa.ArrowException:
                column = pa.nulls(len(column), kind)
            table = table.set_column(at, name, column)
            how = f"cast to {kind}"
        case "value":
            values = column.to_pylist()
            row = rng.randrange(len(values))
            value = rng.choice(STRANGE)
            if isinstance(values[row], list) and rng.random() < 0.5:
                value = [value, *values[row][1:]]
            values[row] = value
            try:
                changed = pa.array(values, column.type)
            except (pa.ArrowException, OverflowError, TypeError, ValueError):
                changed = pa.array([str(value)] * len(values))
            table = table.set_column(at, name, changed)
            how = f"row {row}: {value!r}"[:80]
        case "rows":
            order = rng.choices(range(len(table)), k=rng.randrange(len(table) + 1))
            table = pa.concat_tables([table.slice(i, 1) for i in order] or [table.slice(0, 0)])
            how = f"{len(order)} rows at random"
        case "none":
            table = table.slice(0, 0)
        case "all":
            table = pa.concat_tables([table] * 2)
    path.unlink()
    pq.write_table(table, path)
    return f"{name}: {how}"


def damage_times(root, rng):
    """Change only times: timestamps of rows, the starts of episodes in videos, or the rate."""
    path, name = rng.choice(
        [
            *((path, "timestamp") for path in sorted(root.glob("data/*/*.parquet"))),
            *(
                (path, name)
                for path in sorted(root.glob("meta/episodes/*/*.parquet"))
                for name in pq.read_schema(path).names
                if name.endswith("from_timestamp") and name.startswith("videos/")
            ),
            (root / "meta/info.json", "fps"),
        ]
    )
    if name == "fps":
        info = json.loads(path.read_text())
        info["fps"] = info["fps"] * rng.choice([0.5, 0.98, 1.001, 2, 3])
        _write(path, json.dumps(info).encode())
        return f"fps: {info['fps']}"
    table = pq.read_table(path)
    values = np.array(table[name].to_pylist(), np.float64)
    frame, some = 1 / 10, np.array([rng.random() < 0.3 for _ in values])
    # Episodes may lie in a video in any order, so starts that change places are not damaged times.
    orders = ["swap", "reverse"] if name == "timestamp" else []
    how = rng.choice(["shift", "shift some", "scale", "jitter", "round", "one", *orders])
    match how:
        case "shift" | "shift some":
            by = frame * rng.choice([-3, -1, -0.9, -0.5, 0.2, 0.5, 0.9, 1, 2, 50])
            values = values + by * (some if how == "shift some" else 1)
        case "scale":
            values = values * rng.choice([0.5, 0.98, 0.999, 1.001, 1.01, 2])
        case "jitter":
            values = values + frame * rng.choice([0.02, 0.3, 1]) * np.random.default_rng(
                rng.randrange(99)
            ).standard_normal(len(values))
        case "swap":
            i = rng.randrange(len(values))
            values[[i, i - 1]] = values[[i - 1, i]]
        case "reverse":
            values = values[::-1]
        case "round":
            values = np.round(values, rng.choice([0, 1, 2]))
        case "one":
            values[rng.randrange(len(values))] += frame * rng.choice([-1, 0.5, 1, 7])
    at = table.column_names.index(name)
    column = pa.array(values, table.column(at).type)
    path.unlink()
    pq.write_table(table.set_column(at, name, column), path)
    return f"{path.relative_to(root)}: {name}: {how}"


def pictures(source):
    """Return a hash of the picture of each row that can be read, by (episode, row)."""
    found = {}
    for index in range(0, len(source), max(len(source) // 60, 1)):
        try:
            clip = source[index]
        except UserError:
            continue
        for frame in clip["frames_VT"][0][:1]:
            pixels = frame if isinstance(frame, np.ndarray) else frame.to_ndarray(format="rgb24")
            found[clip["episode"], clip["start"]] = hashlib.sha256(pixels.tobytes()).hexdigest()
    return found


def wrong_pictures(base, root):
    """Return (pictures compared, how many are another row's) of a copy with damaged times."""
    settings = {"frames": 1, "fps": 1, "stride": 1}
    try:
        source = LeRobotSource(root, **settings)
    except UserError as error:
        _refusal(error, root)
        return 0, 0
    right = pictures(LeRobotSource(base, **settings))
    found = pictures(source)
    return len(found), sum(found[row] != right[row] for row in found)


def read(root):
    """Open and read as training does; return the outcome, or raise what should not happen."""
    try:
        source = LeRobotSource(root, frames=4, fps=4, labels="auto")
        source.describe(), source.statistics(), source.notes
    except UserError as error:
        return _refusal(error, root)
    if not len(source) or not source.draws:
        raise AssertionError("no clips, and no error")
    reader, skips = reader_of(source, skip=True), Skips(1.0)
    skipped = 0
    for position, number in enumerate(np.linspace(0, source.draws - 1, READS, dtype=int)):
        try:
            clip, errors = reader.read(position, int(number))
        except UserError as error:
            return _refusal(error, root)
        skips.note(errors)
        for error in errors:
            _refusal(error, root)
        if clip["skipped"] != bool(errors):
            raise AssertionError(f"skipped is {clip['skipped']}, with {len(errors)} errors")
        skipped += clip["skipped"]
        for name, (dtype, *_) in reader.dtype.fields.items():
            value = np.asarray(clip[name])
            kind, shape = dtype.subdtype or (dtype, ())
            if value.shape != shape or value.dtype != kind or not np.isfinite(value).all():
                raise AssertionError(f"{name}: {value.dtype}{value.shape}, wanted {kind}{shape}")
    return "skipped" if skipped else "read"


def compare(root):
    """Check the dataset; raise where training refuses or warns of it and check finds nothing."""
    try:
        findings, _ = check(root)
    except UserError:
        return  # no dataset at all
    try:
        wrong = LeRobotSource(root, frames=4, fps=4).notes
    except UserError as error:
        # An option that does not fit a sound dataset is no fault of the dataset.
        wrong = "" if str(error).startswith("data.") else str(error)
    if wrong and not findings:
        raise AssertionError(f"check finds nothing; training: {wrong}")


def _refusal(error, root):
    lines = str(error).splitlines()
    if not 1 <= len(lines) <= 3 or not any(s in lines[0] for s in (str(root), "data.", "eval.")):
        raise AssertionError(f"not a clear error: {error}")
    return "refused"


def most_memory():
    """Return the peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("seeds", help="FIRST:END")
    flags = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    av.logging.set_level(None)
    for seed in range(*map(int, flags.seeds.split(":"))):
        with tempfile.TemporaryDirectory(dir=flags.base.parent) as folder:
            root = Path(folder) / "set"
            shutil.copytree(flags.base, root, copy_function=os.link)
            what = damage(root, random.Random(f"{flags.base.name} {seed}"))
            print(json.dumps({"case": seed, "damage": what}), flush=True)
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            held, began = most_memory(), time.monotonic()
            try:
                outcome = read(root)
                compare(root)
            except Exception:
                import traceback

                outcome = traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            print(
                json.dumps(
                    {
                        "case": seed,
                        "outcome": outcome,
                        "grown_mb": (most_memory() - held) >> 20,
                        "seconds": round(time.monotonic() - began, 2),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
