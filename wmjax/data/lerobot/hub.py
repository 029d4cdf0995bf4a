"""Download datasets of the Hugging Face Hub into its cache: only the files that a run reads."""

import functools
import re
from pathlib import Path

from wmjax.data.lerobot.info import read_info
from wmjax.data.lerobot.paths import Folder, templates
from wmjax.data.lerobot.recording import choose_cameras
from wmjax.errors import UserError
from wmjax.hub import snapshot


@functools.cache
def download(repo_id: str, revision: str, cameras: str) -> Path:
    """Download metadata, tables and the videos of `cameras`; return the folder in the cache.

    revision: branch, tag or commit; '' is main. Resolved once a process, so that all splits read
    one commit; the folder is named after it. Offline, the cache alone is read.
    """
    root = _snapshot(repo_id, revision, ["meta/*"])
    try:
        info = read_info(Folder(root))
        features = info["features"]
        chosen = choose_cameras(root, features, cameras)
    except UserError as error:
        raise UserError(f"{error}\nfrom data.repo_id={repo_id!r}") from None
    patterns = [_pattern(template, "*") for template in templates(info, "data")]
    for camera in chosen:
        end = camera.split(".")[-1]  # a folder may be named after the last part alone
        if features[camera]["dtype"] == "video":
            patterns += [
                _pattern(template, name)
                for template in templates(info, "video")
                for name in dict.fromkeys([camera, end, f"*.{end}"])
            ]
    return _snapshot(repo_id, root.name, patterns)


def _pattern(template: str, camera: str) -> str:
    """Return the glob pattern of all files of this camera under a path template."""
    return re.sub(r"\{(\w+)[^}]*\}", lambda m: camera if m[1] == "video_key" else "*", template)


def _snapshot(repo_id: str, revision: str, patterns: list[str]) -> Path:
    where = f"data.repo_id={repo_id!r}" + (f", data.revision={revision!r}" if revision else "")
    return snapshot(
        repo_id,
        patterns,
        kind="dataset",
        revision=revision,
        where=where,
        instead="give a folder: --config.data.root=DIR",
    )
