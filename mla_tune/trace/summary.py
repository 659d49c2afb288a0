"""What one trace says: how many events of which kind, and what ran how often, how long in sum and how long in the clock."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec

from mla_tune.errors import TraceError
from mla_tune.trace.busy_time import Interval, union_ns
from mla_tune.trace.chrome_event import GPU_WORK, Event, EventKind, kind_of, nanoseconds
from mla_tune.trace.event_stream import EventStream

_Process = int | float | str | None


class Lane(StrEnum):
    """Whose work is compared."""

    GPU = "GPU"
    CPU = "CPU"

    @property
    def kinds(self) -> frozenset[EventKind]:
        """Events that are work there. An operator of the CPU contains those that it calls; kernels contain nothing."""
        return GPU_WORK if self is Lane.GPU else frozenset({EventKind.OPERATOR})


@dataclass(frozen=True, slots=True, order=True)
class TracedWork:
    """What ran: everything of one kind and name counts as the same."""

    kind: EventKind
    name: str

    @property
    def is_collective(self) -> bool:
        """Whether it belongs to NCCL (or AMD's RCCL), whose time is mostly waiting for other ranks."""
        lowered = self.name.lower()
        return self.kind in (EventKind.KERNEL, EventKind.OPERATOR) and ("nccl" in lowered or "rccl" in lowered)


@dataclass(frozen=True, slots=True)
class Tally:
    """How often something ran and how long in sum, overlaps counted as often as they occur."""

    count: int
    sum_ns: int

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, self.sum_ns + other.sum_ns)


NEVER = Tally(0, 0)


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One file, read."""

    path: Path
    rank: int | None
    world_size: int | None
    gpu_names: tuple[str, ...]
    """Products of the GPUs that worked, as far as the file tells."""
    lane: Lane
    events: dict[EventKind, int]
    """Events of every kind; a pair of begin and end is two."""
    work: dict[TracedWork, Tally]
    wall_ns: int
    """Time in which at least one piece of work ran: the union over the streams of a device, summed over devices."""
    wall_without_nccl_ns: int
    """The same of everything but NCCL's kernels."""
    unfinished: int
    """Pieces of work whose end the file does not have: counted, with no time."""


@dataclass(slots=True)
class _Device:
    """Begins and ends on one device, packed: a trace has hundreds of thousands."""

    plain: array[int] = field(default_factory=lambda: array("q"))
    collective: array[int] = field(default_factory=lambda: array("q"))

    def add(self, interval: Interval, *, collective: bool) -> None:
        (self.collective if collective else self.plain).extend(interval)

    def walls(self) -> tuple[int, int]:
        """Busy nanoseconds with NCCL's kernels and without."""
        plain = sorted(_pairs(self.plain))
        without = union_ns(plain)
        return (union_ns([*plain, *_pairs(self.collective)]) if self.collective else without), without


def _pairs(packed: array[int]) -> Iterator[Interval]:
    return zip(packed[::2], packed[1::2], strict=True)


@dataclass(frozen=True, slots=True)
class _Edge:
    """A begin or end event (phases B and E): an end closes the last begin that is open in its thread."""

    ts_ns: int
    is_end: bool
    entry: _Entry | None
    """Of what begins, where that is work."""
    device: _Process


@dataclass(slots=True)
class _Entry:
    """What is known of one piece of work so far."""

    work: TracedWork
    is_collective: bool
    count: int = 0
    sum_ns: int = 0


@dataclass(slots=True)
class _Collector:
    """What the events so far add up to."""

    lane: Lane
    forms: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    """Events by phase and category."""
    entries: dict[tuple[str | None, str | None], _Entry] = field(default_factory=dict)
    """Work by category and name, as events have them."""
    devices: defaultdict[_Process, _Device] = field(default_factory=lambda: defaultdict(_Device))
    edges: defaultdict[tuple[_Process, _Process], list[_Edge]] = field(default_factory=lambda: defaultdict(list))
    unfinished: int = 0

    def add(self, events: Iterable[Event]) -> None:
        """Take in more events. Raises ``ValueError`` for a time or a device that cannot be read."""
        forms = [(event.ph, event.cat) for event in events]
        self.forms.update(forms)
        different = set(forms)
        edges = {form for form in different if form[0] in ("B", "E")}
        whole = {form for form in different if form[0] == "X" and kind_of(*form) in self.lane.kinds}
        for form, event in zip(forms, events, strict=True):
            if form in whole:
                self._add_whole(self._entry(event), event)
            elif form in edges:
                self._add_edge(event)

    def _entry(self, event: Event) -> _Entry:
        key = event.cat, event.name
        try:
            return self.entries[key]
        except KeyError:
            work = TracedWork(kind_of(event.ph, event.cat), event.name or "")
            return self.entries.setdefault(key, _Entry(work, work.is_collective))

    def _add_whole(self, entry: _Entry, event: Event) -> None:
        begin, duration = nanoseconds(event.ts), nanoseconds(event.dur)
        if begin is None or duration is None:
            self._add_unfinished(entry)
            return
        if duration < 0:
            raise ValueError(f"no event may end before it begins: got {duration} ns of {entry.work.name[:60]!r}")
        self._finish(entry, self._device(event), begin, begin + duration)

    def _add_edge(self, event: Event) -> None:
        ts_ns = nanoseconds(event.ts)
        if ts_ns is None:
            raise ValueError(f"a begin or end must have a time: {(event.name or '')[:60]!r} has none")
        is_end = event.ph == "E"
        is_work = not is_end and kind_of(event.ph, event.cat) in self.lane.kinds
        entry = self._entry(event) if is_work else None
        edge = _Edge(ts_ns, is_end, entry, self._device(event) if entry else None)
        self.edges[event.pid, event.tid].append(edge)

    def _device(self, event: Event) -> _Process:
        return event.device if self.lane is Lane.GPU else event.pid

    def _finish(self, entry: _Entry, device: _Process, begin: int, end: int) -> None:
        entry.count += 1
        entry.sum_ns += end - begin
        self.devices[device].add((begin, end), collective=entry.is_collective)

    def _add_unfinished(self, entry: _Entry) -> None:
        self.unfinished += 1
        entry.count += 1

    def close(self) -> None:
        """Match begins with ends, now that all are there. Those of one instant stay in the file's order."""
        for edges in self.edges.values():
            opened: list[_Edge] = []
            for edge in sorted(edges, key=lambda edge: edge.ts_ns):
                if not edge.is_end:
                    opened.append(edge)
                elif opened and (begin := opened.pop()).entry is not None:
                    self._finish(begin.entry, begin.device, begin.ts_ns, edge.ts_ns)
            for begin in opened:
                if begin.entry is not None:
                    self._add_unfinished(begin.entry)
        self.edges.clear()

    def kinds(self) -> Counter[EventKind]:
        """How many events are of each kind."""
        found: Counter[EventKind] = Counter()
        for form, count in self.forms.items():
            found[kind_of(*form)] += count
        return found

    def tallies(self) -> dict[TracedWork, Tally]:
        """How often and how long everything ran."""
        found: dict[TracedWork, Tally] = {}
        for entry in self.entries.values():
            found[entry.work] = found.get(entry.work, NEVER) + Tally(entry.count, entry.sum_ns)
        return found


def summarize_trace(path: Path, lane: Lane = Lane.GPU) -> TraceSummary:
    """Read one trace. Raises :class:`TraceError` for a file that is none, is not whole or has no event, and ``OSError``."""
    stream = EventStream(path)
    collector = _Collector(lane)
    try:
        for events in stream.pieces():
            collector.add(events)
    except (ValueError, msgspec.DecodeError) as error:
        raise TraceError(f"{path} has an event that cannot be compared: {error}; record the trace again") from None
    collector.close()
    kinds = collector.kinds()
    _require_profiler(path, kinds)
    walls = [device.walls() for device in collector.devices.values()]
    return TraceSummary(
        path=path,
        rank=stream.rank,
        world_size=stream.world_size,
        gpu_names=_names(stream, collector),
        lane=lane,
        events=dict(kinds),
        work=collector.tallies(),
        wall_ns=sum(wall for wall, _ in walls),
        wall_without_nccl_ns=sum(without for _, without in walls),
        unfinished=collector.unfinished,
    )


_FOREIGN = frozenset({EventKind.FLOW, EventKind.METADATA, EventKind.OTHER})


def _require_profiler(path: Path, kinds: Counter[EventKind]) -> None:
    """Refuse what holds no event that torch.profiler writes: nothing could be compared, and no difference is no answer."""
    if kinds.keys() <= _FOREIGN:
        raise TraceError(
            f"{path} must have events of torch.profiler: none of its {kinds.total()} is a kernel, a copy, an operator, "
            "a CUDA call or an annotation; record it with torch.profiler, or mla-tune trace"
        )


def _names(stream: EventStream, collector: _Collector) -> tuple[str, ...]:
    if collector.lane is Lane.CPU:
        return ()
    found = (gpu.name for gpu in stream.gpus if gpu.id in collector.devices and gpu.name)
    return tuple(dict.fromkeys(found))
