"""What the commands that use the device print: plan, progress, outcome, verification, environment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from mla_tune.cli.output.policy_output import policy_json
from mla_tune.cli.output.render import console, note, status

if TYPE_CHECKING:
    from mla_tune.cli.pipeline import Fitted, Measured
    from mla_tune.cli.places import LocalDevice
    from mla_tune.fit.goal import Validation
    from mla_tune.fit.repeat import Repetition
    from mla_tune.hardware.sku import Environment
    from mla_tune.store.limit_try import Try
    from mla_tune.store.measurement import Measurement
    from mla_tune.sweep.grid import Point
    from mla_tune.sweep.probe import Bound
    from mla_tune.sweep.runner import Progress as SweepProgress
    from mla_tune.sweep.runner import Report


def plan(points: Sequence[Point], device: LocalDevice, as_json: bool) -> None:
    """The points of a sweep by site, and how long it may take."""
    from mla_tune.sweep.estimate import estimated_seconds

    seconds = estimated_seconds(points, device.kind)
    counts = Counter((point.site.key, str(point.role)) for point in points)
    if as_json:
        rows = [{"site": site, "role": role, "points": count} for (site, role), count in sorted(counts.items())]
        print(json.dumps({"gpu": device.sku, "points": len(points), "estimated_seconds": round(seconds), "plan": rows}))
        return
    table = RichTable("site", "points for the fit", "held-out points", title=f"plan for {device.sku}")
    for site in sorted({site for site, _ in counts}):
        table.add_row(site, str(counts[site, "fit"]), str(counts[site, "held_out"]))
    console.print(table)
    console.print(
        f"{len(points)} points, about {seconds:.0f} s, and then more near the crossovers; "
        "nothing was measured (--dry-run)",
        highlight=False,
    )


@contextmanager
def live_progress(quiet: bool) -> Iterator[Callable[[SweepProgress], None]]:
    """A progress line on standard error: points done, rate, remaining time and the point under way."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[point]}"),
    )
    with Progress(*columns, console=status, disable=quiet, transient=False) as bar:
        task = bar.add_task("sweep", total=None, rate="", point="")

        def update(progress: SweepProgress) -> None:
            rate = f"{progress.done / progress.elapsed_s:.1f}/s" if progress.done and progress.elapsed_s else ""
            point = _point_text(progress.point) if progress.point else ""
            bar.update(task, total=progress.total, completed=progress.done, rate=rate, point=point)

        yield update


def _point_text(point: Point) -> str:
    shape = point.shape
    return f"{point.site.key} reqs={shape.num_reqs} qo={shape.num_qo_tokens} kv={shape.kv_tokens}"


def _sweep_counts(reports: Sequence[Report], database: Path) -> dict[str, object]:
    return {
        "database": str(database),
        "measured": sum(report.points for report in reports),
        "known": sum(report.already_done for report in reports),
        "left": sum(report.left for report in reports),
        "failed_rows": sum(report.failed for report in reports),
        "disturbed": sum(report.disturbed for report in reports),
        "restarts": reports[-1].restarts,
        "seconds": round(sum(report.elapsed_s for report in reports), 1),
    }


def sweep_reports(measured: Measured) -> None:
    """What a sweep did, what it gave up, and how to go on where it did not finish, on standard error."""
    reports = measured.reports
    counts = _sweep_counts(reports, measured.path)
    note(
        "{measured} points measured in {seconds} s, {known} known before; {failed_rows} rows without a timing, "
        "{restarts} worker restarts; stored in {database}".format(**counts)
    )
    for given_up in dict.fromkeys(entry for report in reports for entry in report.given_up):
        note(f"{given_up.candidate} at {given_up.site}: {given_up.reason}")
    for line in dict.fromkeys(line for report in reports for line in report.recovered):
        note(line)
    for bound in measured.limits.bounds:
        note(_bound_text(bound))
    for line in measured.suspects:
        note(f"no limit yet: {line}; it is not chosen from there up; next: mla-tune probe --suspects")
    for trouble in dict.fromkeys(trouble for report in reports for trouble in report.troubles):
        note(f"spoiled from outside: {trouble}")
    if counts["disturbed"]:
        note(
            f"{counts['disturbed']} points were spoiled from outside: run the same command again when nothing disturbs it"
        )
    if counts["left"]:
        note(f"{counts['left']} points are left: run the same command again to go on")


def sweep_json(measured: Measured, repetitions: Sequence[Repetition], fitted: Fitted | None, policy_path: Path) -> None:
    """What a sweep did and the policy that came of it (null without one), as one JSON document."""
    print(
        json.dumps(
            {
                **_sweep_counts(measured.reports, measured.path),
                "given_up": [asdict(entry) for entry in measured.reports[-1].given_up],
                "limits": [_bound_json(bound) for bound in measured.limits.bounds],
                "suspects": list(measured.suspects),
                "troubles": [trouble for report in measured.reports for trouble in report.troubles],
                "repetitions": [_repetition_json(entry) for entry in repetitions],
                "policy": policy_json(fitted.policy, fitted.evidence, str(policy_path)) if fitted else None,
            }
        )
    )


def tried(quiet: bool) -> Callable[[Try], None]:
    """What to call with every try of a probe: a line on standard error."""

    def show(attempt: Try) -> None:
        took = f", first call {attempt.first_call_s:.2f} s" if attempt.first_call_s is not None else ""
        said = f": {attempt.detail}" if attempt.detail else ""
        tokens = attempt.shape.num_qo_tokens
        note(f"{attempt.candidate} at {attempt.site.key}, {tokens} query tokens: {attempt.outcome}{took}{said}")

    return (lambda _: None) if quiet else show


def bounds(found: Sequence[Bound], as_json: bool) -> None:
    """How far each candidate goes, or why it was not tried, and what its first call costs at each size of shape."""
    if as_json:
        print(json.dumps([_bound_json(bound) for bound in found]))
        return
    for bound in found:
        if not bound.tries:
            note(_bound_text(bound))
    table = RichTable("site", "candidate", "runs at", "fails at", "tries", "reason")
    for bound in found:
        fails_at = str(bound.fails_at) if bound.fails_at else "-"
        table.add_row(
            bound.site.key, bound.candidate, str(bound.runs_at), fails_at, str(len(bound.tries)), bound.reason
        )
    console.print(table)
    calls = RichTable("candidate", "query tokens", "first call, s", title="slowest first call in a fresh process")
    for candidate in dict.fromkeys(bound.candidate for bound in found):
        for bucket, seconds in _first_calls([bound for bound in found if bound.candidate == candidate]).items():
            calls.add_row(candidate, bucket, f"{seconds:.2f}")
    console.print(calls)


def _first_calls(found: Sequence[Bound]) -> dict[str, float]:
    """Slowest first call in each octave of query tokens, ``"64 - 127"`` and so on."""
    slowest: dict[int, float] = {}
    for attempt in (attempt for bound in found for attempt in bound.tries):
        if attempt.first_call_s is not None:
            octave = 1 << (attempt.shape.num_qo_tokens.bit_length() - 1)
            slowest[octave] = max(slowest.get(octave, 0.0), attempt.first_call_s)
    return {f"{octave} - {2 * octave - 1}": slowest[octave] for octave in sorted(slowest)}


def _bound_text(bound: Bound) -> str:
    where = f"{bound.candidate} at {bound.site.key}"
    if not bound.tries:
        return f"{where}: {bound.reason}"
    if bound.fails_at is None:
        if bound.cleared:
            return f"{where}: ran in a fresh process at the {bound.runs_at} query tokens at which the sweep saw it fail"
        why = f" ({bound.reason})" if bound.reason else ""
        return f"{where}: no limit found, runs at {bound.runs_at} query tokens{why}"
    return f"{where}: runs at {bound.runs_at} query tokens, fails at {bound.fails_at}: {bound.reason}"


def _bound_json(bound: Bound) -> dict[str, object]:
    return {
        "site": bound.site.key,
        "candidate": bound.candidate,
        "runs_at": bound.runs_at,
        "fails_at": bound.fails_at,
        "reason": bound.reason,
        "tries": len(bound.tries),
        "first_call_s": _first_calls([bound]),
    }


def repetition(found: Repetition, database: Path) -> None:
    """How far a repeated sweep agrees with the first."""
    middle, high, worst = (f"{100 * part:.2f} %" for part in found.differences)
    console.print(
        f"repeated in {database}: {found.points} comparisons made twice, {found.ambiguous} of them ambiguous; "
        f"{len(found.flips)} choices flip, {len(found.clear_flips)} of them outside the ambiguous band",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"the same path differs between the sweeps by {middle} at the median, {high} at the 95th percentile, {worst} at "
        f"most ({found.timings} paths)",
        highlight=False,
        soft_wrap=True,
    )
    for flip in found.clear_flips:
        shape = f"({flip.shape.num_reqs}, {flip.shape.num_qo_tokens}, {flip.shape.kv_tokens})"
        console.print(f"flip: {flip.table} {shape}: {flip.first.choice}, then {flip.second.choice}", highlight=False)


def _repetition_json(found: Repetition) -> dict[str, object]:
    return {
        "points": found.points,
        "ambiguous": found.ambiguous,
        "flips": len(found.flips),
        "flips_outside_the_ambiguous_band": len(found.clear_flips),
        "timings": found.timings,
        "differences": dict(zip(("median", "p95", "max"), found.differences, strict=True)),
    }


def verification(rows: Sequence[Measurement], as_json: bool) -> None:
    """The outcome of every comparison with the reference."""
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "site": r.site.key,
                        "shape": asdict(r.shape),
                        "candidate": r.candidate,
                        "outcome": r.outcome,
                        "detail": r.detail,
                    }
                    for r in rows
                ]
            )
        )
        return
    table = RichTable("site", "candidate", "reqs", "qo", "kv", "outcome", "detail")
    for row in rows:
        shape = row.shape
        numbers = (str(shape.num_reqs), str(shape.num_qo_tokens), str(shape.kv_tokens))
        table.add_row(row.site.key, row.candidate, *numbers, str(row.outcome), row.detail)
    console.print(table)


def validation(result: Validation, missed: Sequence[str], as_json: bool) -> None:
    """How the policy and every baseline did on fresh points, and where the policy lost most."""
    if as_json:
        print(json.dumps({**asdict(result), "missed": list(missed)}))
        return
    table = RichTable("rule", "points", "mean", "p99", "worst", title="slowdown on fresh random shapes")
    for rule in result.losses:
        table.add_row(rule.rule, str(rule.points), *(f"{value:.4f}" for value in (rule.mean, rule.p99, rule.worst)))
    console.print(table)
    for title, losses in (("worst", result.worst), ("slower than the incumbent", result.below_incumbent)):
        for loss in losses:
            shape = loss.shape
            console.print(
                f"{title}: {loss.slowdown:.3f} at {loss.table}, {shape.num_reqs} requests, {shape.num_qo_tokens} query "
                f"tokens, {shape.kv_tokens} context tokens: {loss.choice}",
                highlight=False,
            )
    if result.unsure:
        entry = max(result.unsure, key=lambda entry: entry.relative)
        console.print(
            f"unsure: {len(result.unsure)} points are not judged, a median there is known to worse than 5 %; the worst: "
            f"{entry.candidate} to {entry.relative:.0%} at {entry.table}, {entry.shape.num_qo_tokens} query tokens",
            highlight=False,
        )
    console.print("goal met" if not missed else "goal missed", highlight=False)


def environment(product: str, found: Environment, serving: Mapping[str, str], incomplete: str | None) -> None:
    """What measurements on this machine would record, and what serves each engine; ``incomplete`` says what it lacks."""
    table = RichTable(show_header=False)
    table.add_row("product", product)
    for name, value in asdict(found).items():
        if name not in ("libraries", "product"):
            table.add_row(name, str(value) or "-")
    for library in found.libraries:
        table.add_row(library.name, f"{library.version} sha256 {library.sha256[:16]}")
    table.add_row("id", found.id if incomplete is None else escape(f"unknown: {incomplete}"))
    for engine, line in serving.items():
        table.add_row(f"serves {engine}", escape(line))
    console.print(table)
