"""Print a table on stdout."""

import shutil
import sys
from collections.abc import Sequence

from globe_kernels.table import WIDTH, Table


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of these rows."""
    show_table(Table(title, header, rows))


def show_table(table: Table) -> None:
    """Print an empty line and a table as wide as the terminal, or as 80 characters in a pipe."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    print(f"\n{table.text(width)}")
