"""The command ``tune``: search the launch parameters of the project's own kernels on this GPU."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.options import DbOption, GpuOption, JsonOption, positive_seconds
from mla_tune.cli.output import render
from mla_tune.cli.places import database_path, make_folder, this_device
from mla_tune.errors import UsageError
from mla_tune.sites.launch_parameters import KERNELS, parameters

if TYPE_CHECKING:
    from mla_tune.sweep.tuning.tuner import ClassReport, TuneProgress

_DEFAULT_BUDGET_S = 480.0
"""Seconds to search for: with the start of the worker a run stays under ten minutes."""


def tune(
    gpu: GpuOption = "auto",
    kernel: Annotated[list[str] | None, typer.Option("--kernel", help="Only this kernel; may be repeated.")] = None,
    budget: Annotated[float, typer.Option("--budget", help="Seconds to search for.")] = _DEFAULT_BUDGET_S,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the search.")] = 0,
    db: DbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search the fastest launch parameters of our own kernels on this GPU. Run again, it goes on where it was.

    Example: mla-tune tune --kernel dequantize_v4 --budget 120
    """
    for name in kernel or ():
        if name not in KERNELS:
            raise UsageError(f"--kernel must be a kernel of ours: got {name!r}; accepted: {', '.join(KERNELS)}")
    positive_seconds("--budget", budget)
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"--seed must be a 32-bit number: got {seed}; accepted: 0 to 4294967295")
    device = this_device(gpu)
    if device.kind == "cpu":
        # Launch parameters are Triton's, and the CPU runs the torch versions: that is an answer, not a mistake.
        print("[]" if as_json else "nothing to tune: the CPU runs the torch versions, which have no launch parameters")
        return
    from mla_tune.store.database import Database
    from mla_tune.store.lock import sweep_lock
    from mla_tune.sweep.tuning.tuner import Tuner, targets

    path = db or database_path(device.sku)
    make_folder(path)
    with sweep_lock(path), Database.open(path) as database, Tuner(device.kind) as tuner:

        def on_class(report: ClassReport) -> None:
            if report.tuned is not None:
                database.record_tuned(tuner.environment, [report.tuned])
            if not as_json:
                print(_line(report), flush=True)

        reports = tuner.run(path, targets(kernel or ()), budget, seed, _quiet, on_class)
    if as_json:
        print(json.dumps([_entry(report) for report in reports]))
    elif any(report.tuned for report in reports):
        render.note(
            f"launch parameters stored in {path}; next: `mla-tune sweep` measures with them and writes them to the policy"
        )


def _quiet(progress: TuneProgress) -> None:
    """A line for each trial would say little; each size class gets one."""


def _line(report: ClassReport) -> str:
    place = f"{report.kernel} from {report.size_from} {KERNELS[report.kernel].unit}"
    if report.tuned is None:
        return f"{place}: none: {report.reason}"
    tuned = report.tuned
    chosen = ", ".join(f"{name} {value}" for name, value in parameters(tuned.launch.config).items())
    rest = f", {report.left} left" if report.left else ""
    gain = f"{tuned.latency_us:.2f} us, default {tuned.default_us:.2f} ({tuned.default_us / tuned.latency_us:.3f}x)"
    return f"{place}: {gain}: {chosen} [{tuned.trials} tried{rest}]"


def _entry(report: ClassReport) -> dict[str, object]:
    tuned = report.tuned
    return {
        "kernel": report.kernel,
        "size_from": report.size_from,
        "reason": report.reason,
        "left": report.left,
        "tuned": None if tuned is None else {**asdict(tuned), "launch": parameters(tuned.launch.config)},
    }
