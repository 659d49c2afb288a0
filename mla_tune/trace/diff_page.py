"""A comparison as one HTML file that needs no network: readable in light and dark, narrow and in print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from mla_tune.trace import wording
from mla_tune.trace.difference import Change, Group, Total, TraceDiff

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --more: #b3261e; --less: #146c2e; }
@media (prefers-color-scheme: dark) { :root { --more: #ff8a80; --less: #81d89b; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th, td { vertical-align: top; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .name { text-align: left; white-space: normal; }
.name { font-family: ui-monospace, monospace; font-size: .85em; overflow-wrap: anywhere; min-width: 12rem; }
tr.end td { font-weight: 600; border-top: 2px solid; }
.more { color: var(--more); } .less { color: var(--less); }
summary { cursor: pointer; font-weight: 600; margin-top: 1.2rem; }
@media print { details > * { display: block; } }
"""


def diff_page(found: TraceDiff) -> str:
    """The whole page, with every name."""
    return "\n".join(_page(found)) + "\n"


def _page(found: TraceDiff) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Trace diff</title><style>{_STYLE}</style></head><body>"
    yield "<h1>Trace diff</h1>"
    yield f'<p class="verdict">{escape(wording.verdict(found))}</p><ul>'
    for name, side in (("A", found.a), ("B", found.b)):
        for trace in side.traces:
            yield f'<li>{name}: <span class="name">{escape(wording.trace_line(trace))}</span></li>'
    for note in wording.notes(found):
        yield f"<li>Note: {escape(note)}</li>"
    yield "</ul>"
    yield from _totals("Totals", "Times in microseconds.", found.totals())
    if ranks := found.ranks():
        yield from _totals(f"{found.wall_name} by rank", "Times in microseconds.", ranks)
    events = Total("events", found.a.events, found.b.events)
    yield from _totals("Account of the events", "Every event is of one kind.", found.events(), events)
    yield from _totals("Account of the count", "Every name is in one group.", found.counts())
    yield from _totals(
        f"Account of the {found.wall_name}",
        "Microseconds. The groups are sums of durations; the overlap of streams is taken off; what is left is the wall.",
        found.times(),
        found.wall,
    )
    if (alone := found.nccl_alone()).a or alone.b:
        yield from _totals(
            "NCCL", "Microseconds. What else ran, and nothing but NCCL, add up to the wall.", found.halves()
        )
    for group in Group:
        yield from _changes(found, group)
    yield "</body></html>"


def _totals(title: str, caption: str, totals: Iterable[Total], end: Total | None = None) -> Iterator[str]:
    yield f"<h2>{escape(title)}</h2>"
    yield f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
    yield "<thead><tr><th></th><th>A</th><th>B</th><th>B - A</th><th>%</th></tr></thead><tbody>"
    for total in totals:
        yield f"<tr>{_cells(total)}</tr>"
    if end is not None:
        yield f'<tr class="end">{_cells(end)}</tr>'
    yield "</tbody></table></div>"


def _cells(total: Total) -> str:
    figures = (
        wording.amount(total, total.a),
        wording.amount(total, total.b),
        wording.amount(total, total.delta, signed=True),
        wording.percent(total.percent),
    )
    return f"<td>{escape(total.name)}</td>{''.join(f'<td>{figure}</td>' for figure in figures)}"


def _changes(found: TraceDiff, group: Group) -> Iterator[str]:
    changes = found.of(group)
    is_open = " open" if changes and group is not Group.STEADY else ""
    yield f"<details{is_open}><summary>{escape(wording.group_title(found, group))}: {len(changes)}</summary>"
    if changes:
        yield '<div class="scroll"><table><thead><tr><th class="name">name</th><th>count A</th><th>count B</th>'
        yield "<th>sum A, us</th><th>sum B, us</th><th>B - A, us</th></tr></thead><tbody>"
        for change in changes:
            yield _change_row(change)
        yield "</tbody></table></div>"
    yield "</details>"


def _change_row(change: Change) -> str:
    figures = (
        f"{change.a.count:,}",
        f"{change.b.count:,}",
        wording.microseconds(change.a.sum_ns),
        wording.microseconds(change.b.sum_ns),
    )
    word = "more" if change.delta_ns > 0 else "less" if change.delta_ns < 0 else "same"
    delta = f'<td class="{word}">{wording.microseconds(change.delta_ns, signed=True)}</td>'
    name = f'<td class="name">{escape(wording.printable(change.work.name))}</td>'
    return f"<tr>{name}{''.join(f'<td>{figure}</td>' for figure in figures)}{delta}</tr>"
