"""What ``policy diff`` prints: text for a terminal, Markdown for a pull request, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from mla_tune.cli.output.plain_text import wrapped
from mla_tune.cli.revisions import NamedVersion
from mla_tune.policy.comparison import MovedAnswers, PolicyChange, TableChange, table_name
from mla_tune.policy.file_form import written_tokens

if TYPE_CHECKING:
    from mla_tune.replay.measured_changes import MeasuredChange, PredictedChange

_SHOWN_MOVES = 3
"""Of a table, the largest moves; the rest is counted."""
ALIKE = "no difference that a server sees"


@dataclass(frozen=True, slots=True)
class ChangeJudgement:
    """What the measurements say of a change."""

    measured: tuple[MeasuredChange, ...] = ()
    predicted: tuple[PredictedChange, ...] = ()
    ratio: float | None = None
    """Old time over new time at all changed measured shapes, on geometric average."""
    by: str = ""
    """The export that judged."""
    reason: str | None = None
    """Why nothing could be judged."""


@dataclass(frozen=True, slots=True)
class DiffReport:
    """All that is told of one comparison."""

    old: NamedVersion
    new: NamedVersion
    change: PolicyChange
    judged: ChangeJudgement
    evidence: tuple[str, ...] = ()
    """How the judgement beside the policies differs."""


def print_diff(report: DiffReport, *, markdown: bool, as_json: bool) -> None:
    """Print a comparison in the form that was asked for."""
    if as_json:
        print(json.dumps(_as_json(report)))
        return
    lines = _markdown(report) if markdown else wrapped(_text(report))
    print("\n".join(lines))


def verdict(report: DiffReport) -> str:
    """One line: how many answers change, and what that wins or costs."""
    change, judged = report.change, report.judged
    if change.serves_alike:
        return ALIKE
    share = _share(change.changed, change.forwards, change) if change.changed else f"no {_unit(change)}"
    said = [f"{share} {'change' if change.changed else 'changes'} the answer"]
    if not change.changed:
        said.append("only settings differ" if _has_settings(change) else "thresholds move between the grid's shapes")
    elif judged.reason is not None:
        said.append(f"not judged: {judged.reason}")
    elif judged.ratio is None:
        said.append("no measured shape lies on a changed answer: the gain is unknown")
    else:
        changed = sum(entry.changed for entry in judged.measured)
        said.append(f"at {changed} measured shapes among them the new policy is {_faster(judged.ratio)}")
    return "; ".join(said)


def _has_settings(change: PolicyChange) -> bool:
    return bool(change.served) or any(table.settings for table in change.tables)


def _text(report: DiffReport) -> Iterator[str]:
    yield from _head(report)
    change = report.change
    for line in change.served:
        yield f"changed   {line}"
    for table in change.tables:
        yield ""
        yield table_name(table.table)
        yield from (f"  {line}" for line in _table_lines(report, table))
    unseen = [*change.provenance, *report.evidence]
    if unseen:
        yield ""
        yield "what no server sees:"
        yield from (f"  {line}" for line in unseen)
    yield ""
    yield f"verdict: {verdict(report)}"


def _head(report: DiffReport) -> Iterator[str]:
    change, gpu = report.change, report.new.policy.gpu
    yield f"GPU       {', '.join(gpu.skus)}, {gpu.sm_count} {'threads' if gpu.sku == 'cpu' else 'SMs'}"
    for name, version in (("old", report.old), ("new", report.new)):
        yield f"{name:<9} {version.name} ({version.policy.evidence}, sha256 {version.sha256[:12]})"
        if version.fault is not None:
            yield f"warning   {version.fault}"
    yield f"provider  {report.new.policy.provider or 'own kernels'}"
    over = "recorded forwards" if change.traffic else "shapes of a grid over the measured ranges"
    yield f"asked     {change.forwards} {over}, each of every layer's table"
    if report.judged.by:
        yield f"judged    by the measurements in {report.judged.by}"


def _table_lines(report: DiffReport, table: TableChange) -> Iterator[str]:
    yield f"{_share(table.changed, table.forwards, report.change)} change the answer"
    ranked = sorted(table.moves, key=lambda move: -move.forwards)
    for move in ranked[:_SHOWN_MOVES]:
        yield f"  {_move_text(move, report.change)}"
    if len(ranked) > _SHOWN_MOVES:
        rest = sum(move.forwards for move in ranked[_SHOWN_MOVES:])
        yield f"  and {rest} {_units(report.change)} in {len(ranked) - _SHOWN_MOVES} other ways"
    yield from table.settings
    yield from _judged_lines(report.judged, table)


def _move_text(move: MovedAnswers, change: PolicyChange) -> str:
    tokens, context, requests = (_span(ends) for ends in (move.query_tokens, move.context, move.requests))
    return (
        f"{move.before} -> {move.after}: {move.forwards} {_units(change)}, within query tokens {tokens}, context "
        f"{context}, requests {requests}"
    )


def _judged_lines(judged: ChangeJudgement, table: TableChange) -> Iterator[str]:
    found = next((entry for entry in judged.measured if entry.key == table.key), None)
    if found is not None and table.changed:
        if found.ratio is None or found.best is None or found.worst is None:
            yield f"measured: none of {found.measured} measured shapes lies there"
        else:
            ends = f"{found.worst:.3f} to {found.best:.3f}"
            yield (
                f"measured: {found.changed} of {found.measured} shapes lie there ({found.held_out} held out): "
                f"{_faster(found.ratio)}, old over new time {ends}"
            )
            yield f"mean slowdown at all {found.measured}: {found.slowdown_before:.4f} -> {found.slowdown_after:.4f}"
    guess = next((entry for entry in judged.predicted if entry.key == table.key), None)
    if guess is not None:
        ends = f"{guess.worst:.3f} to {guess.best:.3f}"
        yield f"PREDICTED by cost curves at {guess.shapes} shapes, not measured: {_faster(guess.ratio)}, {ends}"


def _markdown(report: DiffReport) -> Iterator[str]:
    change = report.change
    yield f"### Policy of {', '.join(report.new.policy.gpu.skus)}: `{report.new.name}`"
    yield ""
    yield f"**{verdict(report)[0].upper()}{verdict(report)[1:]}.**"
    yield ""
    yield f"Compared with `{report.old.name}`; {change.forwards} {_units(change)} asked."
    if report.judged.by:
        yield f"ChangeJudgement by the measurements in `{report.judged.by}`."
    for version in (report.old, report.new):
        if version.fault is not None:
            yield f"\n> **Warning:** {version.fault}"
    for line in change.served:
        yield f"- {line}"
    if change.tables:
        yield ""
        yield f"| table | {_units(change)} that change | measured there | old / new time | mean slowdown |"
        yield "| --- | --- | --- | --- | --- |"
        yield from (_markdown_row(report, table) for table in change.tables)
        yield ""
        yield "<details><summary>Which answers and settings change</summary>"
        yield ""
        for table in change.tables:
            yield f"- {table_name(table.table)}"
            yield from (f"  - {line.strip()}" for line in _table_lines(report, table))
        yield ""
        yield "</details>"
    unseen = [*change.provenance, *report.evidence]
    if unseen:
        yield ""
        yield "<details><summary>What no server sees</summary>"
        yield ""
        yield from (f"- {line}" for line in unseen)
        yield ""
        yield "</details>"


def _markdown_row(report: DiffReport, table: TableChange) -> str:
    found = next((entry for entry in report.judged.measured if entry.key == table.key), None)
    if found is None:
        judged = ["not judged", "-", "-"]
    else:
        ratio = "-" if found.ratio is None else f"{found.ratio:.3f} ({found.worst:.3f} to {found.best:.3f})"
        means = "-" if found.slowdown_before is None else f"{found.slowdown_before:.4f} → {found.slowdown_after:.4f}"
        judged = [f"{found.changed} of {found.measured}", ratio, means]
    share = f"{_percent(table.changed, table.forwards)} ({table.changed} of {table.forwards})"
    return f"| {' | '.join([table_name(table.table), share, *judged])} |"


def _as_json(report: DiffReport) -> dict[str, Any]:
    change = report.change
    versions = {
        name: {"name": of.name, "sha256": of.sha256, "evidence": of.policy.evidence, "fault": of.fault}
        for name, of in (("old", report.old), ("new", report.new))
    }
    return {
        **versions,
        "gpu": msgspec.to_builtins(report.new.policy.gpu),
        "serves_alike": change.serves_alike,
        "asked": {"shapes": change.shapes, "forwards": change.forwards, "traffic": change.traffic},
        "changed": change.changed,
        "served": change.served,
        "provenance": [*change.provenance, *report.evidence],
        "tables": [_table_json(table) for table in change.tables],
        "judged_by": report.judged.by or None,
        "not_judged": report.judged.reason,
        "measured": msgspec.to_builtins(report.judged.measured),
        "predicted": msgspec.to_builtins(report.judged.predicted),
        "old_over_new_time": report.judged.ratio,
        "verdict": verdict(report),
    }


def _table_json(table: TableChange) -> dict[str, Any]:
    site, model, h_q, layer, engine = table.key
    return {
        "site": site,
        "model": model,
        "h_q": h_q,
        "layer": layer,
        "engine": str(engine),
        "shapes": table.shapes,
        "forwards": table.forwards,
        "changed": table.changed,
        "share": table.share,
        "moves": msgspec.to_builtins(table.moves),
        "settings": table.settings,
    }


def _unit(change: PolicyChange) -> str:
    return "forward" if change.traffic else "shape"


def _units(change: PolicyChange) -> str:
    return f"{_unit(change)}s"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole if whole else 0.0:.2f} %"


def _share(part: int, whole: int, change: PolicyChange) -> str:
    return f"{_percent(part, whole)} of {_units(change)} ({part} of {whole})"


def _span(ends: tuple[int, int]) -> str:
    low, high = map(written_tokens, ends)
    return str(low) if low == high else f"{low} to {high}"


def _faster(ratio: float) -> str:
    return f"{ratio:.3f}x faster" if ratio >= 1 else f"{1 / ratio:.3f}x slower"
