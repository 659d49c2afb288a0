"""The command ``validate``: a policy's choices against fresh measurements on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.answering import EngineOption, PolicyOption, Question, answering
from mla_tune.cli.options import (
    DEFAULT_TIMEOUT_S,
    GpuOption,
    JsonOption,
    ModelOption,
    TimeoutOption,
    chosen_models,
    parsed_count,
    positive_seconds,
)
from mla_tune.cli.output import device_output
from mla_tune.cli.places import make_folder, this_device, validation_path
from mla_tune.cli.priced import policy_conditions
from mla_tune.errors import GoalMissedError, UsageError
from mla_tune.sites.provider import OWN

if TYPE_CHECKING:
    from mla_tune.fit.observations import Observations
    from mla_tune.sweep.grid import Point

_MOST_POINTS = 100_000


def validate(
    gpu: GpuOption = "auto",
    points: Annotated[
        int,
        typer.Option(
            "--points", parser=parsed_count, metavar="COUNT", help="Random shapes to measure, over all sites together."
        ),
    ] = 400,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the shapes; one that no fit has used.")] = 1,
    engine: EngineOption = OWN,
    policy: PolicyOption = None,
    model: ModelOption = None,
    db: Annotated[
        Path | None, typer.Option("--db", help="Its own database (default db/<sku>.validate.db of the user's folder).")
    ] = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Measure random shapes and judge a policy by them; exit 3 if it misses its goal. Run again, it goes on.

    Example: mla-tune validate --points 200 --seed 7
    """
    device = this_device(gpu)
    if not 1 <= points <= _MOST_POINTS:
        raise UsageError(f"--points must be a number of shapes: got {points}; accepted: 1 to {_MOST_POINTS}")
    positive_seconds("--timeout", timeout)
    found = answering(Question(engine, device.sku, policy, allow_modelled=True))
    loaded, stated = found.policy, found.stated
    models = chosen_models(model)
    from mla_tune.fit.goal import Goal
    from mla_tune.fit.goal import validate as judge
    from mla_tune.sweep.grid import cpu_grid, gpu_grid, validation_points

    grid = cpu_grid() if device.kind == "cpu" else gpu_grid(device.sm_count)
    path = db or validation_path(device.sku)
    make_folder(path)
    conditions = policy_conditions(loaded)
    drawn = validation_points(grid, models, seed, points)
    wanted = [replace(point, site=conditions.at(point.site)) for point in drawn]
    result = judge(_measured(device.kind, path, wanted, timeout, loaded.regime, as_json), loaded, stated)
    missed = result.missed(Goal())
    device_output.validation(result, missed, as_json)
    if missed:
        raise GoalMissedError(f"the policy misses its goal: {'; '.join(missed)}; next: sweep again and fit")


def _measured(kind: str, path: Path, points: list[Point], timeout_s: float, regime: str, quiet: bool) -> Observations:
    """What was measured at ``points`` in the policy's ``regime``, now or by an earlier call."""
    from mla_tune.fit.observations import Observations
    from mla_tune.hardware.datasheet import architecture
    from mla_tune.store.database import Database
    from mla_tune.store.lock import sweep_lock
    from mla_tune.store.measurement import Regime
    from mla_tune.sweep.preset import DEFAULT
    from mla_tune.sweep.runner import Sweep

    places = {(point.site, point.shape) for point in points}
    with (
        sweep_lock(path),
        Database.open(path) as database,
        Sweep(kind, timeout_s, sampling_s=DEFAULT.sampling_s) as worker,
        device_output.live_progress(quiet=quiet) as on_progress,
    ):
        worker.run(database, points, on_progress=on_progress)
        rows = database.measurements(worker.environment.id)
        family = architecture(worker.environment.sku)
    measured = (row for row in rows if (row.site, row.shape) in places)
    return Observations(measured, regime=Regime(regime), architecture=family)
