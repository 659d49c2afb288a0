"""The command ``doctor``: what would make a measurement or a server's choice fail or mislead here, each with its mend."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import entry_points
from importlib.util import find_spec

import typer

from mla_tune.cli.options import JsonOption
from mla_tune.errors import MlaTuneError
from mla_tune.hardware.builds import DEEP_GEMM, FLASH_MLA, VLLM, distributions_of, installed_version
from mla_tune.hardware.nvml import GpuIdentity, detect_gpu
from mla_tune.sites.provider import SGLANG

SAMPLE = (64, 1 << 17, 1)
"""Query tokens, context tokens and requests of the sample decision: a short extend of a long context."""
_SAMPLE_MODEL = "deepseek-v3.2"
_MEASURING = ("filelock", "numpy", "optuna", "pynvml", "scipy", "sqlalchemy", "sqlite_utils", "torch", "triton")
_PLUGIN_GROUPS = {SGLANG: "sglang.srt.plugins", VLLM: "vllm.general_plugins"}
_PLUGIN_FILTERS = {SGLANG: "SGLANG_PLUGINS", VLLM: "VLLM_PLUGINS"}
_PLUGIN = "mla_tune"
_SCRIPTS = ("MLA_TUNE_CACHE", "MLA_TUNE_SKIP_ENGINES", "MLA_TUNE_NEWEST_ENGINES")
"""Variables that the scripts of a checkout read."""


class Health(StrEnum):
    """How a thing is."""

    FINE = "fine"
    NOTE = "note"
    """Misleads nobody: something is left out, and says so where it is asked for."""
    TROUBLE = "trouble"
    """Makes a measurement or a choice fail, or be another than its reader expects."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One thing that was looked at."""

    topic: str
    health: Health
    said: str
    mend: str = ""


def doctor(as_json: JsonOption = False) -> None:
    """Look for what would make a measurement or a lookup fail or mislead here; exit 1 if there is any.

    Example: mla-tune doctor
    """
    from mla_tune.cli.output.plain_text import wrapped

    found = list(diagnoses(os.environ))
    troubles = sum(of.health is Health.TROUBLE for of in found)
    if as_json:
        print(json.dumps([asdict(of) for of in found]))
    else:
        for line in wrapped(_lines(found), hang=8):
            print(line)
        print(f"verdict: {f'{troubles} to mend' if troubles else 'nothing to mend'}, {len(found)} looked at")
    if troubles:
        raise typer.Exit(1)


def _lines(found: Iterable[Diagnosis]) -> Iterator[str]:
    for of in found:
        yield f"{of.health:<8}{of.topic}: {of.said}"
        if of.mend:
            yield f"        mend: {of.mend}"


def diagnoses(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Everything that there is to say, in the order in which one thing depends on another."""
    yield from _variables(environment)
    yield from _packages()
    gpu, said = _gpu()
    yield from said
    if gpu is not None:
        yield from _other_work()
    for engine in (SGLANG, VLLM):
        yield from _plugin(engine, environment)
        yield from _serving(engine)


def _variables(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    from mla_tune.policy.search import HOME_VARIABLE
    from mla_tune.runtime import switches

    read = {value for name, value in vars(switches).items() if name.endswith("_VARIABLE")} | {HOME_VARIABLE, *_SCRIPTS}
    given = sorted(name for name in environment if name.upper().startswith("MLA_TUNE"))
    for name in given:
        if name not in read:
            near = difflib.get_close_matches(name.upper(), sorted(read), 1, cutoff=0.5)
            mend = f"set {near[0]} instead" if near else f"unset it; accepted: {', '.join(sorted(read))}"
            yield Diagnosis("variables", Health.TROUBLE, f"{name} is read by nobody", mend)
    try:
        found = switches.Switches.from_environment(environment)
    except MlaTuneError as error:
        yield Diagnosis("variables", Health.TROUBLE, str(error), "set it to one of the accepted values, or unset it")
        return
    if found.off is not None or found.pins:
        yield Diagnosis("variables", Health.NOTE, f"policies decide nothing: mode {found.mode}")
    known = [f"{name}={environment[name]}" for name in given if name in read]
    yield Diagnosis("variables", Health.FINE, ", ".join(known) or "none is set")


def _packages() -> Iterator[Diagnosis]:
    missing = [name for name in _MEASURING if not _is_there(name)]
    if missing:
        said = f"measuring and fitting lack {', '.join(missing)}"
        yield Diagnosis("packages", Health.NOTE, said, "pip install 'mla-tune[tune]'")
    else:
        yield Diagnosis("packages", Health.FINE, "what measuring and fitting need is installed")
    for module in (FLASH_MLA, DEEP_GEMM):
        names = distributions_of(module)
        there = [f"{name} {version}" for name in names if (version := installed_version(name)) is not None]
        if len(there) > 1:
            said = f"{module} comes from several distributions, one over the other: {', '.join(there)}"
            yield Diagnosis("packages", Health.TROUBLE, said, f"uninstall all of them, then install {names[0]} alone")
        elif there:
            yield Diagnosis("packages", Health.FINE, f"{module}: {there[0]}")
        else:
            yield Diagnosis("packages", Health.NOTE, f"{module} is not installed: nothing of it can run here")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _gpu() -> tuple[GpuIdentity | None, list[Diagnosis]]:
    try:
        gpu = detect_gpu()
    except MlaTuneError as error:  # no answer of the driver, MIG, an order that nobody knows
        return None, [Diagnosis("GPU", Health.TROUBLE, str(error), "as said; then run this again")]
    if gpu is None:
        return None, [
            Diagnosis("GPU", Health.NOTE, "no NVIDIA GPU: commands that measure use the CPU, and nothing serves")
        ]
    said = f"{gpu.product} ({gpu.sku}, {gpu.sm_count} SMs), driver {gpu.driver or 'unknown'}"
    if not gpu.sm_count or not gpu.driver:
        mend = "upgrade the driver: 495 and later tell SM count and version"
        return gpu, [Diagnosis("GPU", Health.TROUBLE, f"{said}: the driver does not tell all of it", mend)]
    return gpu, [Diagnosis("GPU", Health.FINE, said)]


def _other_work() -> Iterator[Diagnosis]:
    """Other processes and throttled clocks, as a measurement would see them."""
    if not _is_there("pynvml"):
        mend = "pip install 'mla-tune[tune]'"
        yield Diagnosis("clocks", Health.NOTE, "nobody can watch clocks and other work: nvidia-ml-py is missing", mend)
        return
    from mla_tune.bench.interference import watch_gpu

    disturbed = watch_gpu().disturbance()
    if disturbed is None:
        yield Diagnosis("clocks", Health.FINE, "no other work on the GPU, and no throttled clock")
    else:
        mend = "end the other work, or cool the GPU and raise its power limit: its timings are set aside"
        yield Diagnosis("clocks", Health.TROUBLE, f"a timing would be disturbed: {disturbed.reason}", mend)


def _plugin(engine: str, environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Whether the engine that is installed would load the plugin, and whether that takes its hooks there."""
    topic = f"{engine} plugin"
    version = installed_version(engine)
    if version is None:
        yield Diagnosis(topic, Health.NOTE, f"{engine} is not installed here")
        return
    releases = _RELEASES[engine]()
    if version not in releases:
        mend = f"install one of {', '.join(releases)}, or a newer mla-tune"
        yield Diagnosis(topic, Health.TROUBLE, f"{engine} {version} is no release whose hooks are known", mend)
    registered = {point.name for point in entry_points(group=_PLUGIN_GROUPS[engine])}
    if _PLUGIN not in registered:
        mend = "pip install mla-tune into the Python that serves"
        yield Diagnosis(topic, Health.TROUBLE, f"{engine} finds no plugin {_PLUGIN} in this Python", mend)
    allowed = environment.get(_PLUGIN_FILTERS[engine])
    if allowed is not None and _PLUGIN not in [word.strip() for word in allowed.split(",")]:
        said = f"{_PLUGIN_FILTERS[engine]}={allowed} keeps the plugin from loading"
        yield Diagnosis(topic, Health.TROUBLE, said, f"add {_PLUGIN} to {_PLUGIN_FILTERS[engine]}, or unset it")
    elif version in releases and _PLUGIN in registered:
        yield Diagnosis(topic, Health.FINE, f"loads in {engine} {version}, whose hooks are known")


def _sglang_releases() -> tuple[str, ...]:
    from mla_tune.integrations.sglang.sglang_state import RELEASES

    return RELEASES


def _vllm_releases() -> tuple[str, ...]:
    from mla_tune.integrations.vllm.vllm_state import RELEASES

    return RELEASES


_RELEASES: dict[str, Callable[[], tuple[str, ...]]] = {SGLANG: _sglang_releases, VLLM: _vllm_releases}


def _serving(engine: str) -> Iterator[Diagnosis]:
    """Which tables serve the engine here and why not the others, with a sample decision."""
    from mla_tune.cli.answering import Question, as_served

    topic = f"{engine} policy"
    # Where the engine or the GPU is not here, nothing can serve, and nobody is misled.
    matters = installed_version(engine) is not None
    bad = Health.TROUBLE if matters else Health.NOTE
    mend = "mla-tune ensure measures what is missing; mla-tune policy show tells what there is" if matters else ""
    try:
        found = as_served(Question(engine))
        resolved = found.resolve("prefill_attention", _SAMPLE_MODEL)
        answer = resolved.explain(*SAMPLE)
    except MlaTuneError as error:
        yield Diagnosis(topic, bad, str(error), mend)
        return
    serving = found.serving
    health = bad if not serving.tables else Health.FINE if serving.complete else Health.NOTE
    yield Diagnosis(topic, health, serving.summary, "" if health is Health.FINE else mend)
    tokens, context, _ = SAMPLE
    who = "the policy" if resolved.fallback is None else f"{engine} itself"
    said = f"{_SAMPLE_MODEL}, {tokens} query tokens in {context} of context: {answer.candidate}, by {who}"
    yield Diagnosis(f"{engine} sample", Health.FINE, said)
