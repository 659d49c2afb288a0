"""What the commands that use the device print: plan, progress, outcome, verification, environment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from mla_tune.cli.render import console, policy_json, status

if TYPE_CHECKING:
    from mla_tune.cli.places import Device
    from mla_tune.policy import Policy
    from mla_tune.sku import Environment
    from mla_tune.store.measurement import Measurement
    from mla_tune.sweep.grid import Point
    from mla_tune.sweep.runner import Progress as SweepProgress
    from mla_tune.sweep.runner import Report


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
    print(json.dumps({**_sweep_counts(reports, database), "policy": policy_json(policy, path) if policy else None}))


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
