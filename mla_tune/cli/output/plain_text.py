"""Plain text that fits the terminal, or what reads it: words are wrapped, and no name is cut."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator

LEAST_COLUMNS = 40
_PIPED_COLUMNS = 80


def columns() -> int:
    """Columns to fit into: the terminal's, or COLUMNS; 80 where neither is known."""
    return max(LEAST_COLUMNS, shutil.get_terminal_size((_PIPED_COLUMNS, 24)).columns)


def wrapped(lines: Iterable[str], width: int | None = None, hang: int = 4) -> Iterator[str]:
    """``lines`` in at most ``width`` columns; a continued line is indented by ``hang`` more than its beginning."""
    width = columns() if width is None else width
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + hang)
        yield from textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
