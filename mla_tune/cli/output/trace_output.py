"""What ``trace-diff`` and ``trace`` print."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from mla_tune.trace import wording
from mla_tune.trace.chrome_event import EventKind
from mla_tune.trace.difference import Change, Group, Total, TraceDiff
from mla_tune.trace.side import Side

_LISTED = (Group.ADDED, Group.REMOVED, Group.RECOUNTED, Group.RETIMED)
_NARROWEST = 40
_FIGURE = 15
"""Width of a column."""


def diff(found: TraceDiff, top: int) -> None:
    """Totals, accounts that add up to them, and ``top`` names of each list (all of them for 0)."""
    for line in _lines(found, top):
        print(line)


@contextmanager
def reading(paths: Sequence[Path]) -> Iterator[None]:
    """Say on a terminal what is being read: traces of a million events take some seconds."""
    size = sum(path.stat().st_size for path in paths)
    with Console(stderr=True).status(f"reading {len(paths)} traces, {size / 1e6:.1f} MB"):
        yield


def written(path: Path) -> None:
    """Where the page lies, on standard error: the output may be JSON."""
    print(f"page written to {path}", file=sys.stderr)


def _lines(found: TraceDiff, top: int) -> Iterator[str]:
    for name, side in (("A", found.a), ("B", found.b)):
        for trace in side.traces:
            yield from _wrapped(f"{name}: {wording.trace_line(trace)}", "   ")
    for note in wording.notes(found):
        yield from _wrapped(f"note: {note}", "      ")
    yield ""
    yield from _table("totals (times in us)", found.totals())
    if ranks := found.ranks():
        yield ""
        yield from _table(f"{found.wall_name} by rank (us)", ranks)
    yield ""
    events = found.events()
    yield from _table("account of the events", events, Total("= events", found.a.events, found.b.events))
    yield ""
    yield from _account(found)
    for group in _LISTED:
        yield from _list(found, group, top)
    yield ""
    yield from _wrapped(wording.verdict(found), "  ")


def _account(found: TraceDiff) -> Iterator[str]:
    """Where the difference of the wall lies: the groups and the overlap add up to it, in every column."""
    counts = found.counts()
    total = Total("= count", sum(line.a for line in counts), sum(line.b for line in counts))
    yield from _table("account of the count", counts, total)
    yield ""
    yield from _table(f"account of {found.wall_name}, us", found.times(), _named("= ", found.wall))
    alone = found.nccl_alone()
    if alone.a or alone.b:
        for half in found.halves():
            yield _row(_named("  ", half))


def _named(prefix: str, total: Total) -> Total:
    return Total(prefix + total.name, total.a, total.b, total.is_time)


def _table(title: str, totals: Iterable[Total], end: Total | None = None) -> Iterator[str]:
    heads = " ".join(f"{head:>{_FIGURE}}" for head in ("A", "B", "B - A"))
    yield f"{title:<24} {heads} {'%':>7}"
    for total in totals:
        yield _row(total)
    if end is not None:
        yield _row(end)


def _row(total: Total) -> str:
    figures = (
        wording.amount(total, total.a),
        wording.amount(total, total.b),
        wording.amount(total, total.delta, signed=True),
    )
    columns = " ".join(f"{_narrow(figure):>{_FIGURE}}" for figure in figures)
    return f"{total.name:<24} {columns} {wording.percent(total.percent, unit=''):>7}"


def _narrow(figure: str) -> str:
    """``figure``, without commas where it would not fit its column: the summed time of hours."""
    return figure if len(figure) <= _FIGURE else figure.replace(",", "")


def _list(found: TraceDiff, group: Group, top: int) -> Iterator[str]:
    changes = found.of(group)
    yield ""
    yield f"{wording.group_title(found, group)}: {len(changes) or 'none'}"
    shown = changes[:top] if top else changes
    for change in shown:
        yield from _wrapped(f"  {_figures(change)}", "    ")
        yield from _wrapped(f"    {wording.printable(change.work.name)}", "    ")
    if rest := changes[len(shown) :]:
        yield f"  and {len(rest)} more, {_sum_text(rest)} in sum (--top 0 shows all)"


def _sum_text(changes: Sequence[Change]) -> str:
    return f"{wording.microseconds(sum(change.delta_ns for change in changes), signed=True)} us"


def _figures(change: Change) -> str:
    a, b = change.a, change.b
    if change.group in (Group.ADDED, Group.REMOVED):
        tally = a if a.count else b
        return f"{tally.count} x, {wording.microseconds(tally.sum_ns)} us"
    count = f"{a.count} x" if a.count == b.count else f"{a.count} -> {b.count} x"
    times = f"{wording.microseconds(a.sum_ns)} -> {wording.microseconds(b.sum_ns)} us"
    share = wording.percent(Total("", a.sum_ns, b.sum_ns).percent)
    return f"{count}, {times} ({wording.microseconds(change.delta_ns, signed=True)}, {share})"


def _wrapped(text: str, indent: str) -> list[str]:
    """``text`` in lines of the terminal's width, cut nowhere; in one line where there is neither terminal nor COLUMNS."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return [text]
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [text]


def diff_json(found: TraceDiff) -> None:
    """Everything, as one JSON document with times in whole nanoseconds."""
    document = {
        "lane": found.lane,
        "a": _side_json(found.a),
        "b": _side_json(found.b),
        "totals": [_total_json(total) for total in found.totals()],
        "ranks": [_total_json(total) for total in found.ranks()],
        "account": {
            "events": [_total_json(total) for total in found.events()],
            "count": [_total_json(total) for total in found.counts()],
            "wall": [_total_json(total) for total in found.times()],
            "nccl_alone": _total_json(found.nccl_alone()),
        },
        **{group.name.lower(): [_change_json(change) for change in found.of(group)] for group in Group},
        "notes": wording.notes(found),
        "verdict": wording.verdict(found),
    }
    print(json.dumps(document))


def _side_json(side: Side) -> dict[str, object]:
    return {
        "traces": [
            {
                "path": str(trace.path),
                "rank": trace.rank,
                "world_size": trace.world_size,
                "gpus": trace.gpu_names,
                "wall_ns": trace.wall_ns,
                "wall_without_nccl_ns": trace.wall_without_nccl_ns,
            }
            for trace in side.traces
        ],
        "events": side.events,
        "gpu_kernels": side.count(EventKind.KERNEL),
        "annotations": side.kinds[EventKind.ANNOTATION],
        "wall_ns": side.wall_ns,
        "wall_without_nccl_ns": side.wall_without_nccl_ns,
        "sum_ns": side.sum_ns,
        "unfinished": side.unfinished,
    }


def _total_json(total: Total) -> dict[str, object]:
    unit = "_ns" if total.is_time else ""
    return {
        "name": total.name,
        f"a{unit}": total.a,
        f"b{unit}": total.b,
        f"delta{unit}": total.delta,
        "percent": None if total.percent is None else round(float(total.percent), 3),
    }


def _change_json(change: Change) -> dict[str, object]:
    return {
        "kind": change.work.kind,
        "name": change.work.name,
        "a_count": change.a.count,
        "b_count": change.b.count,
        "a_sum_ns": change.a.sum_ns,
        "b_sum_ns": change.b.sum_ns,
        "delta_ns": change.delta_ns,
    }
