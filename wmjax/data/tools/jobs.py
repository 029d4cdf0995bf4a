"""What the tools that write datasets share: files that appear whole, and jobs in processes."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wmjax.errors import UserError
from wmjax.run.files import to_json


def claim(
    out: Path,
    mark: Path,
    settings: Mapping[str, Any],
    words: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Create `out` with the settings in its file `mark`, or check that it was begun with them.

    words: (what was found, what is wanted) of a setting that is not a flag --KEY=VALUE.
    """
    path = out / mark
    try:
        if not out.exists() or (out.is_dir() and not any(map(_is_kept, out.rglob("*")))):
            with placed(path) as part:
                part.write_text(to_json(settings))
        if not path.is_file():
            raise UserError(f"{out}: holds other files: wanted a new or an empty folder")
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {error}") from None
    for key, wanted in settings.items():
        if found.get(key) != wanted:
            flags = f"--{key}={found.get(key)}", f"--{key}={wanted}"
            was, now = (words or {}).get(key, flags)
            raise UserError(f"{out}: begun with {was}: wanted {now}, or a new folder")


def _is_kept(path: Path) -> bool:
    return path.is_file() and path.suffix != ".part"


@contextlib.contextmanager
def placed(target: Path) -> Iterator[Path]:
    """Yield a part file to write to; then rename it to `target` in one step."""
    # Its name holds the process id, so that two processes never write to one file.
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with part.open("rb+") as file:  # else a power cut may leave the name without bytes
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None


def run(
    do: Callable[[Any], str],
    jobs: Sequence[Any],
    *,
    total: int,
    workers: int,
    unit: str,
    errors: Sequence[str] = (),
) -> None:
    """Do jobs in processes with a progress bar; `do` returns an error, or ''.

    total: with the jobs that were done before. Raises UserError in the end for `errors` and for
    failed jobs.
    """
    found = list(errors)
    with tqdm(total=total, initial=total - len(jobs), unit=unit) as bar:
        for error in _results(do, jobs, min(workers, len(jobs))):
            found += [error] if error else []
            bar.update()
    if found:
        more = f"\nand {len(found) - 1} other {unit}s" if len(found) > 1 else ""
        raise UserError(f"{found[0]}{more}; {total - len(found)} of {total} {unit}s done and kept")


def _results(do: Callable[[Any], str], jobs: Sequence[Any], workers: int) -> Iterator[str]:
    if workers <= 1:
        yield from map(do, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(do, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                f"--workers={workers}: a worker was killed; out of memory? Resume with fewer"
            ) from None
        except BaseException:
            # Ctrl-C: half a file is useless, and the rest may take minutes.
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _end_with_parent() -> None:
    """End this process when its parent ends, even if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
