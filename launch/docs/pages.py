"""Gives mkdocs the pages of the whole repository, at the places where they are.

So a link between two pages, or to a file, leads to the same place here and in the repository.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FOLDERS = ("configs", "launch", "wmjax")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = [ROOT / "README.md", *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))]
    linked = {
        (page.parent / target).resolve()
        for page in pages
        for target in _LINK.findall(page.read_text())
    }
    wanted = {*pages, *(path for path in linked if path.is_file())}
    names = sorted(str(path.relative_to(ROOT)) for path in wanted)
    own = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    return Files([*(file for file in files if not _ours(file)), *own])


def _ours(file: File) -> bool:
    """Return whether mkdocs found the file in docs_dir."""
    return file.src_dir is not None and Path(file.src_dir).resolve() == Path(__file__).parent
