"""The command ``spot-check``: drawn forwards on real kernels, predicted against measured time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.answering import AllowModelledOption, EngineOption, GpuOption, PolicyOption, Question, answering
from mla_tune.cli.options import DEFAULT_TIMEOUT_S, JsonOption, TimeoutOption, positive_seconds
from mla_tune.cli.places import LocalDevice, this_device
from mla_tune.cli.policies import MeasurementsOption
from mla_tune.cli.priced import Evidence, evidence
from mla_tune.errors import EnvironmentMismatchError, MlaTuneError
from mla_tune.sites.provider import SGLANG
from mla_tune.sites.shape import RaggedShape
from mla_tune.sites.site import Site

if TYPE_CHECKING:
    from mla_tune.fit.observations import Observations
    from mla_tune.replay.spot import ForwardList
    from mla_tune.replay.spot_result import Comparison


def spot_check(
    forwards: Annotated[Path, typer.Argument(help="What `mla-tune traffic --spot-check N --forwards FILE` wrote.")],
    gpu: GpuOption = "auto",
    engine: EngineOption = SGLANG,
    policy: PolicyOption = None,
    allow_modelled: AllowModelledOption = False,
    measurements: MeasurementsOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Time drawn forwards with real kernels on this machine, and print predicted against measured.

    Example: mla-tune spot-check forwards.json --gpu h200
    """
    positive_seconds("--timeout", timeout)
    from mla_tune.cli.output import traffic_output
    from mla_tune.replay.spot import read_forwards

    drawn = read_forwards(forwards)
    found = evidence(drawn.model, drawn.h_q, answering(Question(engine, gpu, policy, allow_modelled)), measurements)
    compared = measured(found, drawn, gpu, timeout, quiet=as_json)
    traffic_output.spot_check(found.answering, compared, as_json)


def measured(found: Evidence, drawn: ForwardList, gpu: str, timeout_s: float, quiet: bool) -> Comparison:
    """Measure ``drawn`` on this machine, which must have the GPU of ``found``, and compare.

    Every candidate is checked against the reference before it is timed, as in a sweep. Raises :class:`MlaTuneError` where
    nothing ran.
    """
    from mla_tune.replay.spot_result import compare

    device = this_device(gpu)
    if device.sku != found.sku:
        raise EnvironmentMismatchError(
            f"predictions are checked on their own GPU: {found.policy} is for {found.sku}, this machine is {device.sku}; "
            "pass --gpu and its policy, or run this on that GPU"
        )
    shapes = [forward.shape for forward in drawn.forwards]
    observations = _observed(device, [site for site, _ in found.pricer.sites], shapes, timeout_s, quiet)
    compared = compare(found.pricer, observations, shapes)
    if not compared.accuracy:
        raise MlaTuneError(f"a spot check needs a candidate that runs here: none did at {len(shapes)} forwards")
    return compared


def _observed(
    device: LocalDevice, sites: Sequence[Site], shapes: Sequence[RaggedShape], timeout_s: float, quiet: bool
) -> Observations:
    from mla_tune.cli.output import device_output
    from mla_tune.fit.observations import Observations
    from mla_tune.store.database import Database
    from mla_tune.sweep.grid import Point
    from mla_tune.sweep.runner import Sweep

    points = [Point(site, shape.evened(), ragged=shape) for shape in shapes for site in sites]
    with (
        tempfile.TemporaryDirectory() as folder,
        Database.open(Path(folder) / "spot.db") as database,
        Sweep(device.kind, timeout_s) as worker,
        device_output.live_progress(quiet) as on_progress,
    ):
        worker.run(database, points, on_progress=on_progress)
        rows = database.measurements(worker.environment.id)
    return Observations(rows)
