"""Two sides compared: what ran only there, more often or longer, and an account of the time that adds up exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from pathlib import Path

from mla_tune.errors import TraceError
from mla_tune.trace.chrome_event import GPU_WORK, EventKind
from mla_tune.trace.side import Side, read_side
from mla_tune.trace.summary import NEVER, Lane, Tally, TracedWork

LEAST_CHANGE_NS = 10_000
LEAST_CHANGE = Fraction(1, 5)
"""Work that ran as often as before has changed where its summed time did by this much and, against A, by this part."""


class Group(StrEnum):
    """What became of a name from A to B; every name is in one group."""

    ADDED = "added"
    REMOVED = "removed"
    RECOUNTED = "changed count"
    RETIMED = "changed time"
    STEADY = "the rest"


@dataclass(frozen=True, slots=True)
class Change:
    """One name on both sides."""

    work: TracedWork
    a: Tally
    b: Tally

    @property
    def delta_ns(self) -> int:
        """Summed time of B less that of A."""
        return self.b.sum_ns - self.a.sum_ns

    @property
    def group(self) -> Group:
        """See :class:`Group`."""
        if not self.a.count:
            return Group.ADDED
        if not self.b.count:
            return Group.REMOVED
        if self.a.count != self.b.count:
            return Group.RECOUNTED
        change = abs(self.delta_ns)
        if change >= LEAST_CHANGE_NS and change >= LEAST_CHANGE * self.a.sum_ns:
            return Group.RETIMED
        return Group.STEADY


@dataclass(frozen=True, slots=True)
class Total:
    """One figure of both sides."""

    name: str
    a: int
    b: int
    is_time: bool = False
    """Nanoseconds rather than a count."""

    @property
    def delta(self) -> int:
        """B less A."""
        return self.b - self.a

    @property
    def percent(self) -> Fraction | None:
        """The difference in percent of A; None where A has nothing."""
        return Fraction(100 * self.delta, self.a) if self.a else None


@dataclass(frozen=True, slots=True)
class TraceDiff:
    """All that is known of two sides."""

    lane: Lane
    a: Side
    b: Side
    changes: tuple[Change, ...]
    """Every name that ran on either side, the largest change of time first."""

    def of(self, group: Group) -> tuple[Change, ...]:
        """The names of one group."""
        return tuple(change for change in self.changes if change.group is group)

    @property
    def wall_name(self) -> str:
        """How the time is called in which something ran."""
        return "CUDA wall" if self.lane is Lane.GPU else "CPU wall"

    @property
    def wall(self) -> Total:
        """Time in which something ran."""
        return Total(self.wall_name, self.a.wall_ns, self.b.wall_ns, is_time=True)

    def totals(self) -> tuple[Total, ...]:
        """The figures that a reader wants first."""
        a, b = self.a, self.b
        kinds = [kind for kind in EventKind if kind in self.lane.kinds]
        return (
            Total("events", a.events, b.events),
            *(Total(kind, a.count(kind), b.count(kind)) for kind in kinds),
            Total(EventKind.ANNOTATION, a.kinds[EventKind.ANNOTATION], b.kinds[EventKind.ANNOTATION]),
            self.wall,
            self.halves()[0],
            Total(f"{self.lane} sum", a.sum_ns, b.sum_ns, is_time=True),
        )

    def events(self) -> tuple[Total, ...]:
        """Events by kind, which add up to all events."""
        kinds = [kind for kind in EventKind if self.a.kinds[kind] or self.b.kinds[kind]]
        return tuple(Total(kind, self.a.kinds[kind], self.b.kinds[kind]) for kind in kinds)

    def counts(self) -> tuple[Total, ...]:
        """How often work of each group ran, which adds up to all work."""
        return tuple(
            Total(group, sum(change.a.count for change in found), sum(change.b.count for change in found))
            for group in Group
            for found in [self.of(group)]
        )

    def times(self) -> tuple[Total, ...]:
        """Time of each group, then the overlap as a negative time: together they are the wall."""
        return (
            *(
                Total(group, sum(change.a.sum_ns for change in found), sum(change.b.sum_ns for change in found), True)
                for group in Group
                for found in [self.of(group)]
            ),
            Total("overlap", self.a.wall_ns - self.a.sum_ns, self.b.wall_ns - self.b.sum_ns, is_time=True),
        )

    def nccl_alone(self) -> Total:
        """Time in which nothing but NCCL ran: the wall less the wall without NCCL."""
        a, b = self.a, self.b
        return Total("NCCL alone", a.wall_ns - a.wall_without_nccl_ns, b.wall_ns - b.wall_without_nccl_ns, is_time=True)

    def halves(self) -> tuple[Total, Total]:
        """The wall without NCCL and the time of NCCL alone, which add up to the wall."""
        a, b = self.a.wall_without_nccl_ns, self.b.wall_without_nccl_ns
        return Total(f"{self.wall_name} without NCCL", a, b, is_time=True), self.nccl_alone()

    def ranks(self) -> tuple[Total, ...]:
        """The wall of each rank, where there are several."""
        if len(self.a.traces) == 1:
            return ()
        pairs = zip(self.a.traces, self.b.traces, strict=True)
        return tuple(Total(f"rank {a.rank}", a.wall_ns, b.wall_ns, is_time=True) for a, b in pairs)


def compare_sides(a: Side, b: Side, lane: Lane) -> TraceDiff:
    """The difference of two runs. Raises :class:`TraceError` for several traces that are not of the same ranks."""
    if max(len(a.traces), len(b.traces)) > 1 and a.ranks != b.ranks:
        raise TraceError(
            f"both sides must have the same ranks: A has {_listed(a)}, B has {_listed(b)}; "
            "name the traces of the same ranks"
        )
    in_a, in_b = a.work, b.work
    changes = [Change(work, in_a.get(work, NEVER), in_b.get(work, NEVER)) for work in {**in_a, **in_b}]
    changes.sort(key=lambda change: (-abs(change.delta_ns), change.work))
    return TraceDiff(lane, a, b, tuple(changes))


def _listed(side: Side) -> str:
    return ", ".join("no rank" if rank is None else str(rank) for rank in side.ranks)


def compare_traces(a: Sequence[Path], b: Sequence[Path]) -> TraceDiff:
    """Read and compare the traces of two runs: the work of GPUs, or the operators of the CPU where no GPU worked."""
    sides = read_side(a, Lane.GPU), read_side(b, Lane.GPU)
    if any(side.kinds[kind] for side in sides for kind in GPU_WORK):
        return compare_sides(*sides, Lane.GPU)
    return compare_sides(read_side(a, Lane.CPU), read_side(b, Lane.CPU), Lane.CPU)
