"""A small SVG writer for the figures of the documents: boxes, texts and arrows that fit light and dark pages."""

import re
from html import escape
from pathlib import Path

# Eight atoms of a bank: colours that differ in lightness too, so that a grey print keeps them apart.
ATOMS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#ee8833", "#44aa99")

# The card has a background: a page in the other theme than the reader's system stays readable.
_STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de; }
    .ink { fill: #1f2328; }
    .soft { fill: #59636e; }
    .dense { fill: #c9d1d9; stroke: #8c959f; }
    .adapter { fill: #57606a; }
    .line { stroke: #59636e; fill: none; stroke-width: 1.5; }
    .head { fill: #59636e; }
    .stage { fill: #f3f5f7; stroke: #8c959f; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #161b22; stroke: #3d444d; }
      .ink { fill: #f0f6fc; }
      .soft { fill: #a5afba; }
      .dense { fill: #4a535d; stroke: #8b949e; }
      .adapter { fill: #c9d1d9; }
      .line { stroke: #a5afba; }
      .head { fill: #a5afba; }
      .stage { fill: #21262d; stroke: #6e7781; }
    }
    text { font-family: 'DejaVu Sans', Verdana, 'Segoe UI', sans-serif; font-size: 14px; }
    .title { font-size: 17px; font-weight: bold; }
    .small { font-size: 12px; }
    .formula { font-size: 22px; font-family: 'DejaVu Serif', Georgia, serif; }
"""


class Drawing:
    """An SVG picture of `width` x `height` pixels, with `about` for readers who cannot see it."""

    def __init__(self, width: int, height: int, about: str):
        self._size, self._about = (width, height), about
        self._parts: list[str] = []
        self.box(0.5, 0.5, width - 1, height - 1, "card", radius=10)

    def box(self, x: float, y: float, width: float, height: float, style: str, radius: float = 2) -> None:
        """A rectangle; `style` is a class of the style sheet or a colour."""
        look = f'fill="{style}"' if style.startswith("#") else f'class="{style}"'
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" {look}/>')

    def text(self, x: float, y: float, words: str, style: str = "ink", anchor: str = "start") -> None:
        """One line of text; a part in braces, such as A{i}, is set as an index."""
        spans = "".join(
            # the empty character carries the way back to the line
            f'<tspan font-size="72%" dy="5">{escape(part)}</tspan><tspan dy="-5">&#8203;</tspan>'
            if odd
            else escape(part)
            for odd, part in ((number % 2, part) for number, part in enumerate(re.split(r"\{(.*?)\}", words)))
        )
        self._parts.append(f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{spans}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through `points` with a head at the last."""
        places = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline points="{places}" class="line" marker-end="url(#head)"/>')

    def write(self, path: Path) -> None:
        """Write the picture to `path`."""
        path.write_text(self.svg(), encoding="utf-8")

    def svg(self) -> str:
        """The picture as text."""
        width, height = self._size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img">\n'
            f"  <title>{escape(self._about)}</title>\n  <style>{_STYLE}  </style>\n"
            '  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" class="head"/></marker></defs>\n'
        )
        return head + "".join(f"  {part}\n" for part in self._parts) + "</svg>\n"
