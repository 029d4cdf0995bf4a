"""Writes one HTML page with all pictures and videos inlined; it loads nothing from outside."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_KINDS = {".png": "image/png", ".mp4": "video/mp4"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fafafa; --soft: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --soft: #a5a5a5; --line: #3a3a3a; }
}
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .3rem; }
p { margin: .3rem 0 .8rem; max-width: 44rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
img, video { width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; box-sizing: border-box; }
ul { margin: .3rem 0 1.5rem; padding-left: 1.2rem; }
.verdict { font-size: 1.15rem; font-weight: 600; max-width: none; }
div { overflow-x: auto; } /* a phone scrolls pictures sideways, so that labels stay legible */
div img { min-width: 44rem; }
@media (max-width: 46rem) {
  div::before { content: "scroll sideways →"; position: sticky; left: 0; color: var(--soft);
    font-size: .85rem; }
}
"""


class Section(NamedTuple):
    """One picture or video of the page. text: how to read it; file: a .png or .mp4."""

    title: str
    text: str
    file: Path


def write(
    path: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: list[Section],
    verdict: str = "",
) -> None:
    """Write the page. facts: (name, value) pairs. verdict: of evals.verdict.text."""
    said, *figures = verdict.splitlines() or [""]
    lines = "".join(f"<li>{html.escape(line.strip())}</li>" for line in figures)
    head = f'<p class="verdict">{html.escape(said)}</p><ul>{lines}</ul>' if said else ""
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts)
    body = "\n".join(map(_section, sections))
    path.write_text(
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{head}<dl>{rows}</dl>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def _section(section: Section) -> str:
    data = base64.b64encode(section.file.read_bytes()).decode()
    link = f"data:{_KINDS[section.file.suffix]};base64,{data}"
    title = html.escape(section.title)
    if section.file.suffix == ".mp4":
        shown = f'<video controls loop muted autoplay playsinline src="{link}"></video>'
    else:
        shown = f'<div><img alt="{title}" src="{link}"></div>'
    return f"<h2>{title}</h2><p>{html.escape(section.text)}</p>\n{shown}"
