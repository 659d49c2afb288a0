"""Figures and sentences of a comparison, as the terminal and the page both have them."""

from __future__ import annotations

from fractions import Fraction

from mla_tune.trace.chrome_event import GPU_WORK
from mla_tune.trace.difference import Group, Total, TraceDiff
from mla_tune.trace.side import Side
from mla_tune.trace.summary import Lane, TraceSummary


def microseconds(nanoseconds: int, *, signed: bool = False) -> str:
    """``1,234.567``: exact, with thousands apart; with ``signed`` a sign before what is not zero."""
    whole, rest = divmod(abs(nanoseconds), 1000)
    sign = "-" if nanoseconds < 0 else "+" if signed and nanoseconds else ""
    return f"{sign}{whole:,}.{rest:03d}"


def amount(total: Total, value: int, *, signed: bool = False) -> str:
    """A figure of ``total``: a time in microseconds, or a count."""
    if total.is_time:
        return microseconds(value, signed=signed)
    return f"{value:+,}" if signed and value else f"{value:,}"


def percent(value: Fraction | None, unit: str = " %") -> str:
    """``+12.3 %``; a dash where there is nothing to compare with, and no sign at zero."""
    if value is None:
        return "-"
    rounded = round(float(value), 1)
    if not rounded:
        return f"0.0{unit}"
    return f"{rounded:+,.1f}{unit}" if abs(rounded) < 10_000 else f"{rounded:+.0e}{unit}"


def trace_line(trace: TraceSummary) -> str:
    """``run/0.json.gz (rank 0 of 8, NVIDIA H200)``."""
    facts = []
    if trace.rank is not None:
        facts.append(f"rank {trace.rank}" + (f" of {trace.world_size}" if trace.world_size is not None else ""))
    facts += trace.gpu_names
    told = f" ({', '.join(facts)})" if facts else ""
    return printable(f"{trace.path}{told}")


def printable(text: str) -> str:
    """``text`` with a backslash form for what would move a cursor, ring or not show."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def group_title(found: TraceDiff, group: Group) -> str:
    """What a list of names has, in words."""
    what = "GPU work" if found.lane is Lane.GPU else "operators"
    return {
        Group.ADDED: f"added: {what} of B alone",
        Group.REMOVED: f"removed: {what} of A alone",
        Group.RECOUNTED: f"changed count: {what} that ran more or less often",
        Group.RETIMED: "changed time: as often as before, sum changed by at least 10 us and 20 %",
        Group.STEADY: f"the rest: {what} that ran as often and about as long",
    }[group]


def notes(found: TraceDiff) -> list[str]:
    """What a reader must know to read the figures right."""
    lines = []
    if found.lane is Lane.CPU:
        lines.append("no GPU worked in either trace: these are operators of the CPU, each with those that it calls")
    if len(found.a.traces) > 1:
        lines.append(f"every figure is a sum over {len(found.a.traces)} ranks, walls too")
    elif found.a.ranks != found.b.ranks:
        lines.append(f"A is of {_rank(found.a)}, B of {_rank(found.b)}")
    names = [
        tuple(dict.fromkeys(name for trace in side.traces for name in trace.gpu_names)) for side in (found.a, found.b)
    ]
    if all(names) and names[0] != names[1]:
        lines.append(f"A ran on {', '.join(names[0])}, B on {', '.join(names[1])}")
    for name, side in (("A", found.a), ("B", found.b)):
        if found.lane is Lane.GPU and not side.count(*GPU_WORK):
            lines.append(f"{name} has no GPU work: it ran on the CPU, or torch.profiler did not reach the GPU")
        if side.unfinished:
            lines.append(f"{side.unfinished} events of {name} have no end: they are counted, with no time")
    return [printable(line) for line in lines]


def _rank(side: Side) -> str:
    (rank,) = side.ranks
    return "no known rank" if rank is None else f"rank {rank}"


def verdict(found: TraceDiff) -> str:
    """The difference that counts, in one sentence."""
    wall = found.wall
    if not any(change.group is not Group.STEADY or change.delta_ns for change in found.changes) and not wall.delta:
        return "no difference: the same work ran as often and as long"
    if not wall.delta:
        return f"{wall.name}: the same, {microseconds(wall.a)} us"
    word = "less" if wall.delta < 0 else "more"
    share = "" if wall.percent is None else f" ({percent(wall.percent)})"
    return f"{wall.name}: B takes {microseconds(abs(wall.delta))} us {word} than A{share}"
