"""Where a measured cost lies, and when two of them cannot be told apart."""

from __future__ import annotations

from dataclasses import dataclass

from mla_tune.policy.evidence import PolicyEvidence
from mla_tune.policy.schema import Table

LEAST_DIFFERENCE = 0.01
"""Two timings of the same kernel in two processes differ by up to this, however tight the interval of each is."""


def noise_band(evidence: PolicyEvidence | None, table: Table) -> float:
    """Relative difference below which two candidates of ``table`` count as equal; the least one without evidence."""
    found = evidence.of(table) if evidence else None
    return found.noise_band if found else LEAST_DIFFERENCE


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
