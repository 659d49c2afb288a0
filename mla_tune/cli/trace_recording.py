"""The command ``trace``: a pair of traces of two candidates, recorded on this machine."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.answering import EngineOption, PolicyOption, Question, answering, checked_engine
from mla_tune.cli.options import GpuOption, parsed_count
from mla_tune.cli.places import LocalDevice, make_folder, this_device
from mla_tune.cli.policies import (
    ContextArgument,
    HeadsOption,
    ModelOption,
    NumReqsOption,
    SiteOption,
    TokensArgument,
)
from mla_tune.cli.priced import policy_conditions
from mla_tune.errors import MlaTuneError, UsageError
from mla_tune.sites.candidates import candidate_at, names_at
from mla_tune.sites.engines import Engine, engine_choice
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES, Launches
from mla_tune.sites.provider import OWN, SGLANG
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, ModelConfig, Site
from mla_tune.sites.site import model as find_model

CandidateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate",
        metavar="NAME",
        help="What to trace: twice for both sides, once against the engine's default (default: the policy's choice).",
    ),
]
LayerOption = Annotated[
    str | None,
    typer.Option("--layer", metavar="TYPE", help="A layer type of the model (default: its most frequent one)."),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write the two traces.")]
RepeatsOption = Annotated[
    int, typer.Option("--repeats", parser=parsed_count, metavar="COUNT", help="Recorded rounds of each candidate.")
]
_MOST_REPEATS = 1000


def trace(
    num_qo_tokens: TokensArgument,
    kv_tokens: ContextArgument,
    model: ModelOption,
    gpu: GpuOption = "auto",
    policy: PolicyOption = None,
    site: SiteOption = "prefill_attention",
    layer: LayerOption = None,
    h_q: HeadsOption = None,
    engine: EngineOption = SGLANG,
    num_reqs: NumReqsOption = 1,
    candidate: CandidateOption = None,
    repeats: RepeatsOption = 5,
    out: OutOption = Path(),
) -> None:
    """Record one layer with the engine's default and with the policy's choice, as a pair for trace-diff.

    Example: mla-tune trace 512 128K --model deepseek-v4-pro --layer c4a --gpu h200
    """
    if not 1 <= repeats <= _MOST_REPEATS:
        raise UsageError(f"--repeats must be a number of rounds: got {repeats}; accepted: 1 to {_MOST_REPEATS}")
    shape = Shape(num_reqs, num_qo_tokens, kv_tokens)
    chooser, device = checked_engine(engine)[1], this_device(gpu)
    # Our own kernels run here, whichever engine's table chooses: the file is the one of those.
    question = Question(OWN, device.sku if policy is None else "auto", policy, allow_modelled=True)
    pair = _pair(shape, _site(find_model(model), site, layer, h_q), model, chooser, candidate, question)
    files = {name: out / f"{device.sku}.{name}.json.gz" for name in pair.names}
    for path in files.values():
        make_folder(path)
    _record(device, pair, shape, files, repeats)
    _next(files, pair.site, shape)


@dataclass(frozen=True, slots=True)
class _Pair:
    """What is recorded."""

    site: Site
    names: tuple[str, str]
    """Of sides A and B."""
    launches: Launches


def _site(config: ModelConfig, name: str, layer: str | None, h_q: int | None) -> Site:
    """One layer type of a model: a whole forward is no single trace of stages."""
    from mla_tune.cli.options import chosen_sites

    (site_name,) = chosen_sites([name])
    if layer is None:
        return config.site(site_name, max(config.site_layers(site_name), key=config.layer_count), h_q)
    if layer not in list(LayerType):
        raise UsageError(
            f"--layer must be a layer type: got {layer!r}; accepted: {', '.join(config.site_layers(site_name))}"
        )
    return config.site(site_name, LayerType(layer), h_q)


def _pair(shape: Shape, site: Site, model: str, engine: Engine, named: list[str] | None, question: Question) -> _Pair:
    """The two candidates to trace, the engine's default first. Raises :class:`UsageError` where they are one."""
    names = list(dict.fromkeys(named or ()))
    if len(names) > 2 or len(names) < len(named or ()):
        raise UsageError(f"--candidate must name one or two different ones: got {', '.join(named or ())}")
    for name in names:
        candidate_at(site, name)
    if len(names) == 2:
        return _Pair(site, (names[0], names[1]), DEFAULT_LAUNCHES)
    if names:
        incumbent, chosen, launches = engine_choice(engine, site.name, site.layer).incumbent, names[0], DEFAULT_LAUNCHES
    else:
        found = answering(question)
        resolved = found.resolve(site.name, model, site.layer, site.h_q, engine)
        incumbent, launches = resolved.incumbent, found.dispatcher.launches
        chosen = resolved.choose(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)
        site = policy_conditions(found.policy).at(site)
    if chosen == incumbent:
        others = ", ".join(name for name in names_at(site) if name != incumbent)
        raise UsageError(
            f"a pair must be of two candidates: got {incumbent} twice, the engine's default there; "
            f"accepted with --candidate: {others}"
        )
    return _Pair(site, (incumbent, chosen), launches)


def _record(device: LocalDevice, pair: _Pair, shape: Shape, files: dict[str, Path], repeats: int) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its progress lines; read when torch is loaded
    from mla_tune.sweep.grid import Point
    from mla_tune.sweep.traced_candidates import trace_candidates
    from mla_tune.trace.chrome_event import EventKind
    from mla_tune.trace.summary import summarize_trace

    trace_candidates(device.kind, Point(pair.site, shape), pair.launches, files, repeats)
    for path in files.values():
        if device.kind == "cuda" and not summarize_trace(path).events.get(EventKind.KERNEL):
            raise MlaTuneError(
                f"a trace of a GPU must have kernels: {path} has none, since torch.profiler did not reach CUPTI; run it "
                "where no other profiler works, with access to the GPU's counters"
            )


def _next(files: dict[str, Path], site: Site, shape: Shape) -> None:
    where = f"{site.key}, {shape.num_qo_tokens} query tokens, {shape.kv_tokens} context tokens"
    for side, (name, path) in zip("AB", files.items(), strict=True):
        print(f"{side}: {name} at {where}: {path}")
    print(f"next: {shlex.join(['mla-tune', 'trace-diff', *map(str, files.values())])}")
