"""Bring files from outside docs/ onto the site, and lead the links between all pages to where the files are there."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
_PICTURES = ("benchmarks/results/cpu/fit_tiny_moe.png",)
# {file in the repository: page of the site}
PAGES = {
    "README.md": "overview.md",
    "benchmarks/results/cpu/README.md": "measurements.md",
    "examples/README.md": "recipes/index.md",
    **{
        path.relative_to(ROOT).as_posix(): f"recipes/{path.parent.name}.md"
        for path in sorted((ROOT / "examples").glob("*/README.md"))
        if path.parent.name != "tiny_moe"
    },
}
_PLACES = PAGES | {picture: picture for picture in _PICTURES}
_NAMED = re.compile(r"(?<![\[`])`([\w./-]+\.md)`(?![\]`])")
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config) -> Files:
    """Add the pages and the pictures that the repository keeps elsewhere."""
    for source, place in _PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Lead the links of a page, which name files of the repository, to their pages; other files lose the link.

    A page that is named from the root in backticks gets a link.
    """
    here = page.file.src_uri
    folder = posixpath.dirname(next((source for source, place in PAGES.items() if place == here), f"docs/{here}"))

    def link(text: str, source: str, heading: str = "") -> str:
        place = _PLACES.get(source) or (source.removeprefix("docs/") if source.startswith("docs/") else None)
        if place in (None, here):
            return text
        return f"[{text}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{heading})"

    def rewritten(found: re.Match) -> str:
        text, target, heading = found.groups(default="")
        source = posixpath.normpath(posixpath.join(folder, target))
        # the check of the links names a file that does not exist
        return link(text, source, heading) if (ROOT / source).exists() else found[0]

    def named(found: re.Match) -> str:
        return link(found[0], found[1]) if (ROOT / found[1]).exists() else found[0]

    return _NAMED.sub(named, _LINK.sub(rewritten, markdown))
