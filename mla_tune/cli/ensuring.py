"""The command ``ensure``, before a server in its container: every table that the engine needs, or a sweep."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.answering import serving_json
from mla_tune.cli.options import JsonOption, checked_provider, positive_seconds
from mla_tune.errors import EnvironmentMismatchError, MlaTuneError, UsageError
from mla_tune.hardware.nvml import detect_gpu
from mla_tune.policy.search import user_home
from mla_tune.runtime.serving import ENGINES, GpuKey, Serving, find_serving
from mla_tune.runtime.switches import Switches

DEFAULT_BUDGET_S = 90.0
"""Seconds to measure for. By replay and on an H200 and an H100, a sweep of that length is within 1.01 of the best mean."""


def ensure(
    engine: Annotated[str, typer.Option("--engine", help="The engine that will be started: sglang, vllm or own.")],
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether every table serves: exit 0 if so, 1 if not.")
    ] = False,
    budget: Annotated[
        float, typer.Option("--budget", help="Seconds to measure for, where a table is missing.")
    ] = DEFAULT_BUDGET_S,
    as_json: JsonOption = False,
) -> None:
    """Return at once where every table that ENGINE needs serves on this GPU; else measure, fit and store a policy.

    What it measures lies in the user's folder (MLA_TUNE_HOME), which comes before the shipped policies. Interrupted, the
    next call goes on. A second call at the same time waits for the first.

    Example: mla-tune ensure --engine sglang --budget 90
    """
    if engine not in ENGINES:
        raise UsageError(f"--engine must be a known engine: got {engine!r}; accepted: {', '.join(ENGINES)}")
    positive_seconds("--budget", budget)
    found = _serving(engine)
    if not _all_serve(found) and not check:
        checked_provider(engine)  # what no sweep can measure is refused before anything is locked
        found = _measured(engine, budget)
    print(json.dumps(_as_json(found)) if as_json else found.summary)
    if not _all_serve(found):
        step = "some tables stay with the engine's own choice"
        if check:
            step = f"next: mla-tune ensure --engine {engine}"
        raise MlaTuneError(f"every table must serve {engine}: {len(found.tables)} of {found.total} do; {step}")


def _all_serve(found: Serving) -> bool:
    """Whether every table serves. One that does without a candidate, which none of its rows names, serves too."""
    return bool(found.tables) and len(found.tables) == found.total


def _serving(engine: str) -> Serving:
    switches = Switches.from_environment(os.environ)
    if switches.off is not None:
        raise UsageError(f"ensure prepares a policy for a server that takes one: {switches.off} is set; unset it first")
    gpu = detect_gpu()
    if gpu is None:
        raise EnvironmentMismatchError(
            "ensure needs the GPU that will serve: got no NVIDIA GPU and driver; run it in the server's own container"
        )
    return find_serving(GpuKey(gpu.sku, gpu.sm_count), engine, switches)


def _measured(engine: str, budget_s: float) -> Serving:
    """What serves after a sweep into the user's folder; another process may have made it meanwhile."""
    from filelock import FileLock

    from mla_tune.cli.sweeping import sweep

    home = _made(user_home())
    with FileLock(home / f"ensure-{engine}.lock"):
        found = _serving(engine)
        if _all_serve(found):
            return found
        sweep(budget=budget_s, provider=engine)
        return _serving(engine)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MlaTuneError(
            f"the user's folder must be writable: {folder}: {error.strerror}; set MLA_TUNE_HOME to another"
        ) from None
    return folder.resolve()


def _as_json(found: Serving) -> dict[str, object]:
    return {
        "engine": found.engine,
        "gpu": found.gpu.sku if found.gpu else None,
        **serving_json(found),
        "complete": _all_serve(found),
    }
