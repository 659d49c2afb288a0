"""Where a measured cost lies, and when two of them cannot be told apart."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_DIFFERENCE = 0.01
"""Two timings of the same kernel in two processes differ by up to this, however tight the interval of each is."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a cost lies, in microseconds."""

    low_us: float
    high_us: float

    def widened(self) -> Interval:
        """At least half of :data:`LEAST_DIFFERENCE` to each side of the middle."""
        middle = (self.low_us + self.high_us) / 2
        half = max(self.high_us - middle, LEAST_DIFFERENCE / 2 * middle)
        return Interval(middle - half, middle + half)

    def overlaps(self, other: Interval) -> bool:
        """Whether a value may be in both, each widened to what two processes differ by."""
        mine, theirs = self.widened(), other.widened()
        return mine.low_us <= theirs.high_us and theirs.low_us <= mine.high_us
