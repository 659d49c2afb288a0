"""Time during which something runs: the union of intervals, so that what overlaps counts once."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[int, int]
"""Begin and end in whole nanoseconds, the end at or after the begin."""


def union_ns(intervals: Iterable[Interval]) -> int:
    """Nanoseconds covered by at least one of ``intervals``, in any order."""
    covered = 0
    reached: int | None = None
    for begin, end in sorted(intervals):
        if reached is None or begin >= reached:
            covered += end - begin
            reached = end
        elif end > reached:
            covered += end - reached
            reached = end
    return covered
