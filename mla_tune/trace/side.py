"""One side of a comparison: the traces of all ranks of one run."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_tune.errors import TraceError
from mla_tune.trace.chrome_event import EventKind
from mla_tune.trace.summary import NEVER, Lane, Tally, TracedWork, TraceSummary, summarize_trace


@dataclass(frozen=True, slots=True)
class Side:
    """The traces of one run, one a rank, sorted by rank. Totals are sums over ranks."""

    traces: tuple[TraceSummary, ...]

    @property
    def ranks(self) -> tuple[int | None, ...]:
        """Rank of each trace; None where the file does not say."""
        return tuple(trace.rank for trace in self.traces)

    @property
    def events(self) -> int:
        """All events."""
        return sum(self.kinds.values())

    @property
    def kinds(self) -> Counter[EventKind]:
        """Events of every kind."""
        return sum((Counter(trace.events) for trace in self.traces), Counter())

    @property
    def work(self) -> dict[TracedWork, Tally]:
        """How often and how long everything ran."""
        found: dict[TracedWork, Tally] = {}
        for trace in self.traces:
            for work, tally in trace.work.items():
                found[work] = found.get(work, NEVER) + tally
        return found

    def count(self, *kinds: EventKind) -> int:
        """How often work of these kinds ran."""
        return sum(tally.count for work, tally in self.work.items() if work.kind in kinds)

    @property
    def sum_ns(self) -> int:
        """Durations of all work added up, overlaps counted as often as they occur."""
        return sum(tally.sum_ns for trace in self.traces for tally in trace.work.values())

    @property
    def wall_ns(self) -> int:
        """Time with any work running; see :attr:`TraceSummary.wall_ns`."""
        return sum(trace.wall_ns for trace in self.traces)

    @property
    def wall_without_nccl_ns(self) -> int:
        """Time with any work running that is not NCCL's."""
        return sum(trace.wall_without_nccl_ns for trace in self.traces)

    @property
    def unfinished(self) -> int:
        """Pieces of work without an end."""
        return sum(trace.unfinished for trace in self.traces)


def trace_files(argument: str) -> tuple[Path, ...]:
    """The files that ``argument`` names: a file, a folder of traces, a pattern, or several of these with commas between.

    Raises :class:`TraceError` where it names none.
    """
    if not argument or Path(argument).exists():
        return _files_of(argument)
    return tuple(path for part in argument.split(",") for path in _files_of(part))


def _files_of(part: str) -> tuple[Path, ...]:
    path = Path(part)
    if part and path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.name.endswith((".json", ".json.gz")))
        if not found:
            raise TraceError(f"{path} must have traces in it: no file there ends in .json or .json.gz")
        return tuple(found)
    if part and not path.exists() and glob.has_magic(part):
        matched = tuple(Path(name) for name in sorted(glob.glob(part)))
        if not matched:
            raise TraceError(f"a pattern must match a trace: no file here is named like {part}")
        return matched
    if not part or not path.exists():
        raise TraceError(f"a trace must be a file, a folder or a pattern that is there: no such file {part!r}")
    return (path,)


def read_side(paths: Sequence[Path], lane: Lane) -> Side:
    """The traces of one run. Raises :class:`TraceError` for several files whose ranks are not told or not different."""
    return Side(by_rank([summarize_trace(path, lane) for path in paths]))


def by_rank(traces: Sequence[TraceSummary]) -> tuple[TraceSummary, ...]:
    """``traces`` sorted by rank; raises :class:`TraceError` as :func:`read_side` does."""
    if len(traces) == 1:
        return tuple(traces)
    seen: dict[int, TraceSummary] = {}
    for trace in traces:
        if trace.rank is None:
            raise TraceError(
                f"of several traces each must name its rank: {trace.path} has no distributedInfo; compare it alone"
            )
        if trace.rank in seen:
            raise TraceError(
                f"a run must have one trace a rank: {seen[trace.rank].path} and {trace.path} are both of rank "
                f"{trace.rank}; name one of them"
            )
        seen[trace.rank] = trace
    return tuple(seen[rank] for rank in sorted(seen))
