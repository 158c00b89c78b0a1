"""A table for a person: text that fits a width, and HTML for a notebook."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap

from globe_kernels.errors import printable
from globe_kernels.units import in_one_unit

WIDTH = 80  # of a pipe, and of a terminal whose width nobody knows
_GAP = "  "


@dataclass(frozen=True)
class Table:
    """A title, the names of the columns and rows of text; a cell may have several lines.

    The first column is text and the others are numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self, width: int = WIDTH) -> str:
        """Write lines of at most `width` characters.

        Columns that do not fit follow below, beside the first column again, so that no cell is ever cut.
        """
        widths = [
            max(len(line) for row in (self.header, *self.rows) for line in row[number].split("\n"))
            for number in range(len(self.header))
        ]
        parts: list[list[int]] = []
        for number in range(1, len(widths)):
            wanted = [0, *(parts[-1] if parts else ()), number]
            if not parts or sum(widths[column] + len(_GAP) for column in wanted) - len(_GAP) > width:
                parts.append([])
            parts[-1].append(number)
        blocks = ("\n".join(self._block([0, *part], widths)) for part in parts)
        title = (
            part
            for line in self.title.split("\n")
            for part in wrap(line, width, break_long_words=False, break_on_hyphens=False)
        )
        return printable("\n".join([*title, "\n\n".join(blocks)]))

    def _block(self, columns: list[int], widths: list[int]) -> Iterable[str]:
        shown = [widths[column] for column in columns]
        yield from _lines([self.header[column] for column in columns], shown)
        yield _GAP.join("-" * width for width in shown)
        for row in self.rows:
            yield from _lines([row[column] for column in columns], shown)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return (
            f"<table><caption>{_html(self.title)}</caption>"
            f"<thead>{_html_row('th', self.header)}</thead>"
            f"<tbody>{''.join(_html_row('td', row) for row in self.rows)}</tbody></table>"
        )


def bytes_table(title: str, sizes: Mapping[str, tuple[float, float]]) -> Table:
    """Lay out bytes {label: (dense, GloBE)} with their ratio."""
    rows = []
    for label, (dense, globe) in sizes.items():
        unit, numbers = in_one_unit((dense, globe))
        rows.append([label, *(f"{number} {unit}" for number in numbers), f"{globe / dense:.3f}"])
    return Table(title, ["", "dense", "GloBE", "ratio"], rows)


def _lines(cells: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
    """Write the lines of a row; a cell with fewer lines than another stands at the bottom."""
    split = [cell.split("\n") for cell in cells]
    height = max(len(lines) for lines in split)
    for line in zip(*([""] * (height - len(lines)) + lines for lines in split), strict=True):
        numbers = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        yield _GAP.join([line[0].ljust(widths[0]), *numbers]).rstrip()


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(_html_cell(tag, number, cell) for number, cell in enumerate(cells))}</tr>"


def _html_cell(tag: str, number: int, cell: str) -> str:
    side = "left" if number == 0 else "right"
    return f'<{tag} style="text-align:{side}">{_html(cell)}</{tag}>'


def _html(text: str) -> str:
    return escape(text).replace("\n", "<br>")
