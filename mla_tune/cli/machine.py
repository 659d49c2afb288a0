"""Commands on the machine as it is: ``verify`` and ``env``."""

from __future__ import annotations

import json
from dataclasses import asdict

from mla_tune.cli.answering import Question, as_served
from mla_tune.cli.options import GpuOption, JsonOption, ModelOption, SiteOption, chosen_models, chosen_sites
from mla_tune.cli.output import device_output, render
from mla_tune.cli.places import this_device
from mla_tune.errors import EnvironmentMismatchError, MissingPackageError, MlaTuneError
from mla_tune.runtime.serving import ENGINES
from mla_tune.sites.provider import OWN


def verify(
    gpu: GpuOption = "auto", model: ModelOption = None, site: SiteOption = None, as_json: JsonOption = False
) -> None:
    """Compare every candidate with the torch reference on small shapes; exit 1 if one differs.

    Example: mla-tune verify --model deepseek-v4-flash
    """
    device = this_device(gpu)
    models, names = chosen_models(model), chosen_sites(site)
    from mla_tune.store.measurement import Outcome
    from mla_tune.sweep.grid import verification_points
    from mla_tune.sweep.runner import Sweep

    with Sweep(device.kind) as worker:
        results = list(worker.check(verification_points(models, names)))
    device_output.verification(results, as_json)
    wrong = [row for row in results if row.outcome not in (Outcome.OK, Outcome.UNSUPPORTED)]
    if wrong:
        raise MlaTuneError(
            f"every candidate must match the reference: {len(wrong)} of {len(results)} checks failed; see above"
        )
    if not any(row.outcome is Outcome.OK for row in results):
        raise MlaTuneError("one candidate at least must be compared: every one is unsupported here; see above")


def env(as_json: JsonOption = False) -> None:
    """Print what this machine is, as measurements record it, and what would serve each engine. Needs no torch.

    Example: mla-tune env --json
    """
    from mla_tune.bench.environment import detect_environment, environment_without_torch
    from mla_tune.hardware.nvml import detect_gpu

    try:
        gpu = detect_gpu()
        product = gpu.product if gpu else "no NVIDIA GPU"
    except EnvironmentMismatchError as error:  # there is one that nobody can tell: the rest is still worth printing
        gpu, product = None, f"unknown: {error}"
    incomplete = None
    try:
        environment = detect_environment(gpu=gpu is not None)
    except (MissingPackageError, EnvironmentMismatchError) as error:
        environment, incomplete = environment_without_torch(gpu), str(error)
    cannot_run = _cannot_run("cpu" if gpu is None else "cuda") if incomplete is None else []
    serving = {engine: as_served(Question(engine)).dispatcher.summary for engine in ENGINES}
    if as_json:
        found = {
            **asdict(environment),
            "product": gpu.product if gpu else None,
            "incomplete": incomplete,
            "policy": serving[OWN],
            "serving": serving,
            "cannot_run": cannot_run,
        }
        print(json.dumps(found, indent=2))
        return
    device_output.environment(product, environment, serving, incomplete)
    for line in cannot_run:
        render.note(line)


def _cannot_run(kind: str) -> list[str]:
    """Each distinct reason why candidates cannot run on this machine, in a line each."""
    from mla_tune.cli.missing_tables import reason_lines
    from mla_tune.sweep.grid import verification_points
    from mla_tune.sweep.runner import Sweep

    sites = [point.site for point in verification_points(chosen_models(None), chosen_sites(None))]
    try:
        with Sweep(kind) as worker:
            return reason_lines(worker.ask_support(sites))
    except MlaTuneError as error:
        return [f"nothing can run here: {error}"]
