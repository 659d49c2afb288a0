"""What the commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from mla_tune.cli.places import export_path
from mla_tune.policy import HeldOut, Policy, Row, Table
from mla_tune.sku import CPU

if TYPE_CHECKING:
    from mla_tune.cli.places import Device
    from mla_tune.learn.explain import Explanation
    from mla_tune.lookup import Explanation as Decision
    from mla_tune.sku import Environment
    from mla_tune.store.database import EnvironmentSummary
    from mla_tune.store.measurement import Measurement
    from mla_tune.sweep.grid import Point
    from mla_tune.sweep.runner import Progress as SweepProgress
    from mla_tune.sweep.runner import Report

# Tables wider than a narrow pipe would be cut: where there is no terminal there is no width to fit into.
console = Console() if Console().is_terminal else Console(width=160)
status = Console(stderr=True)


def plan(points: Sequence[Point], device: Device, as_json: bool) -> None:
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
        f"{len(points)} points, about {seconds:.0f} s, and then a few near each crossover; "
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
        "restarts": reports[-1].restarts,
        "seconds": round(sum(report.elapsed_s for report in reports), 1),
    }


def sweep_reports(reports: Sequence[Report], database: Path) -> None:
    """What a sweep did, and how to go on where it did not finish, on standard error."""
    counts = _sweep_counts(reports, database)
    lines = [
        "{measured} points measured in {seconds} s, {known} known before; {failed_rows} rows without a timing, "
        "{restarts} worker restarts; stored in {database}".format(**counts)
    ]
    if counts["left"]:
        lines.append(f"{counts['left']} points are left: run the same command again to go on")
    for line in lines:
        status.print(line, highlight=False, markup=False, soft_wrap=True)


def sweep_json(reports: Sequence[Report], database: Path, policy: Policy | None, path: Path) -> None:
    """What a sweep did and the policy that came of it (null without one), as one JSON document."""
    print(json.dumps({**_sweep_counts(reports, database), "policy": _policy_json(policy, path) if policy else None}))


def policy_summary(policy: Policy, path: Path, as_json: bool) -> None:
    """The thresholds of a policy and how it did on points that the fit did not see."""
    if as_json:
        print(json.dumps(_policy_json(policy, path)))
        return
    title = f"{policy.gpu.sku}, {policy.gpu.sm_count} {_units(policy)}, {policy.evidence}, {policy.regime} time"
    table = RichTable("site", "model", "h_q", "layer", "kv_tokens", "choice by num_qo_tokens", "slowdown", title=title)
    for entry in policy.tables:
        for index, row in enumerate(entry.rows):
            head = _head(entry) if index == 0 else ("", "", "", "")
            slowdown = _slowdown_text(entry) if index == 0 else ""
            table.add_row(
                *head, f">= {row.kv_tokens_from}", choices_text(row), slowdown, end_section=row is entry.rows[-1]
            )
    console.print(table)
    console.print("slowdown: mean / worst against the faster measured candidate, on held-out points", highlight=False)
    for line in dict.fromkeys(_barred(policy)):
        console.print(line, highlight=False)


def _barred(policy: Policy) -> Iterator[str]:
    """What may not serve, or not everywhere."""
    for table in policy.tables:
        for limit in table.limits:
            heads = f", {table.h_q} heads" if table.h_q else ""
            yield (
                f"limit: {limit.candidate} ({table.site}{heads}) up to {limit.num_qo_tokens} query tokens, "
                f"fails at {limit.fails_at}"
            )
        for entry in table.ineligible:
            yield (
                f"not served: {entry.candidate} ({table.site}): the first call on a new shape takes "
                f"{entry.first_call_s:.1f} s, above {entry.bound_s:g} s (--first-call-bound)"
            )


def _units(policy: Policy) -> str:
    return "threads" if policy.gpu.sku == CPU else "SMs"


def warn(line: str) -> None:
    """One line on standard error that does not stop the command."""
    status.print(f"warning: {line}", highlight=False, soft_wrap=True)


def _policy_json(policy: Policy, path: Path) -> dict[str, object]:
    return {"path": str(path), **msgspec.to_builtins(policy)}


def _head(table: Table) -> tuple[str, str, str, str]:
    return table.site, table.model, str(table.h_q or "-"), table.layer


def choices_text(row: Row) -> str:
    """``with_kvcache; from 130 [118, 143] sparse_fwd``."""
    first, *rest = row.choices
    parts = [first.candidate]
    for choice in rest:
        bracket = f" [{choice.bracket[0]}, {choice.bracket[1]}]" if choice.bracket else ""
        parts.append(f"from {choice.num_qo_tokens_from}{bracket} {choice.candidate}")
    return "; ".join(parts) if rest else f"{first.candidate} (no crossover)"


def _slowdown_text(table: Table) -> str:
    own = table.held_out.slowdown[0]
    return f"{own.mean:.3f} / {own.worst:.2f} ({table.held_out.points} pts)"


def held_out(policy: Policy) -> None:
    """Slowdown of the policy and of every baseline rule, table by table."""
    for entry in policy.tables:
        where = f"{entry.site}, {entry.model}, h_q {entry.h_q or '-'}, {entry.layer}"
        console.print(_rules_table(entry.held_out, f"{where}: {entry.held_out.points} held-out points"))


def provenance(policy: Policy, source: str) -> None:
    """Where a policy comes from."""
    environment = policy.environment
    libraries = (
        ", ".join(f"{library.name} {library.version}" for library in environment.libraries) or "no kernel library"
    )
    console.print(
        f"{source}: schema {policy.schema}, {policy.evidence} with driver {environment.driver}, torch {environment.torch}, "
        f"triton {environment.triton}, {libraries}\n{policy.source.measurements} measurements in {policy.source.file} "
        f"(sha256 {policy.source.sha256[:16]}); made by: {policy.source.command}",
        highlight=False,
    )


def judgement(overall: HeldOut | None, left_out: Sequence[str], lost: int) -> None:
    """Every rule over all attention layer types together, and what could not be judged."""
    if overall:
        console.print(
            _rules_table(overall, f"all attention layer types: {overall.points} held-out (table, shape) pairs")
        )
    for table in left_out:
        console.print(f"no table for {table}: no held-out point judges it yet; sweep again to go on", highlight=False)
    if lost:
        warn(
            f"the policy that was there before had {lost} tables that this one lacks: sweep without filters to have them"
        )


def _rules_table(judged: HeldOut, title: str) -> RichTable:
    table = RichTable("rule", "geomean", "mean", "p95", "worst", title=title)
    for rule in judged.slowdown:
        table.add_row(rule.rule, *(f"{value:.3f}" for value in (rule.geomean, rule.mean, rule.p95, rule.worst)))
    return table


def _this_command() -> list[str]:
    """How a shell in this folder starts the program that runs now: by name where it is on the path."""
    if shutil.which("mla-tune"):
        return ["mla-tune"]
    installed = Path(sys.executable).with_name("mla-tune")
    if installed.exists():
        return [os.path.relpath(installed)]
    return [sys.executable, "-m", "mla_tune"]


def next_command(policy: Policy, path: Path) -> None:
    """Where the policy lies and what to try with it: the table with most thresholds, at one of them."""
    table = max(policy.tables, key=lambda table: sum(len(row.choices) for row in table.rows))
    row = max(table.rows, key=lambda row: len(row.choices))
    tokens = max(row.choices[-1].num_qo_tokens_from, table.measured.num_qo_tokens[0])
    kv_tokens = max(row.kv_tokens_from, table.measured.kv_tokens[0])
    words = [*_this_command(), "explain", "--policy", str(path)]
    if Path(policy.source.file) != export_path(policy.gpu.sku):
        words += ["--measurements", policy.source.file]
    words += ["--site", table.site, "--model", table.model, "--layer", table.layer]
    words += [] if table.h_q is None else ["--h-q", str(table.h_q)]
    print(f"policy written to {path}")
    print(f"next: {shlex.join([*words, str(tokens), str(max(kv_tokens, tokens))])}")


def explanation(result: Explanation, table: Table, as_json: bool) -> None:
    """A choice, and what each candidate costs stage by stage."""
    if as_json:
        print(json.dumps(asdict(result)))
        return
    shape, decision = result.shape, result.decision
    console.print(
        f"{table.site} of {table.model}, layer {table.layer}, h_q {table.h_q or '-'}: {shape.num_qo_tokens} query tokens, "
        f"{shape.kv_tokens} context tokens in {shape.num_reqs} requests",
        highlight=False,
    )
    console.print(f"choice: {decision.candidate}, because: {_because(decision)}", highlight=False)
    columns = RichTable("candidate", "layer", "stage", "runs once per", f"us per {result.unit}")
    for candidate in result.candidates:
        for index, line in enumerate(candidate.stages):
            once = str(line.amortization).removeprefix("per_").replace("_", " ")
            name = candidate.candidate if index == 0 else ""
            columns.add_row(name, str(line.layer), line.stage, once, f"{line.latency_us:.2f}")
        measured = f" (measured here: {candidate.measured_us:.2f})" if candidate.measured_us is not None else ""
        columns.add_row(
            "", "", f"sum x {candidate.correction:.3f}, whole path over sum", "", f"{candidate.total_us:.2f}{measured}"
        )
        columns.add_section()
    console.print(columns)


def _because(decision: Decision) -> str:
    if decision.num_qo_tokens_from is None:
        return str(decision.reason)
    bracket = f", crossover inside [{decision.bracket[0]}, {decision.bracket[1]}]" if decision.bracket else ""
    return (
        f"{decision.reason}: row from {decision.kv_tokens_from} kv_tokens, choice from "
        f"{decision.num_qo_tokens_from} num_qo_tokens{bracket}"
    )


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


def environment(product: str, found: Environment, served_by: str) -> None:
    """What measurements on this machine would record."""
    table = RichTable(show_header=False)
    table.add_row("product", product)
    for name, value in asdict(found).items():
        if name != "libraries":
            table.add_row(name, str(value) or "-")
    for library in found.libraries:
        table.add_row(library.name, f"{library.version} sha256 {library.sha256[:16]}")
    table.add_row("id", found.id)
    table.add_row("policy", served_by)
    console.print(table)


def database(rows: Sequence[EnvironmentSummary], as_json: bool) -> None:
    """One line for each environment in a database."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], default=str))
        return
    table = RichTable("environment", "sku", "measurements", "outcomes", "first", "last")
    for row in rows:
        outcomes = ", ".join(f"{name} {count}" for name, count in row.outcomes)
        table.add_row(
            row.environment.id,
            row.environment.sku,
            str(row.measurements),
            outcomes,
            f"{row.first_finished_at:%Y-%m-%d %H:%M}",
            f"{row.last_finished_at:%Y-%m-%d %H:%M}",
        )
    console.print(table)
