"""The command ``chunks``: which chunk size to prefill with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mla_tune.cli.answering import AllowModelledOption, EngineOption, GpuOption, PolicyOption, Question, answering
from mla_tune.cli.options import JsonOption, parsed_count, token_count
from mla_tune.cli.policies import HeadsOption, MeasurementsOption, ModelOption
from mla_tune.cli.priced import evidence
from mla_tune.cli.traffic_command import RestOption, SpeedOption, TraceOption
from mla_tune.errors import UsageError
from mla_tune.sites.provider import SGLANG
from mla_tune.sites.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.replay.chunks import Prompts
    from mla_tune.replay.prices import Pricer
    from mla_tune.sites.shape import AnyShape

PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="Tokens of a prompt, or TOKENS:WEIGHT; several make a distribution."),
]


@dataclass(frozen=True, slots=True)
class _Batched:
    """Prompts, and the forwards that they make at a chunk size, each with how often it occurs."""

    label: str
    forwards: Callable[[Pricer, int], Mapping[AnyShape, float]]


def chunks(
    model: ModelOption,
    prompt: PromptOption = None,
    trace: TraceOption = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            parser=parsed_count,
            metavar="COUNT",
            help="Requests at a time (default 1 prompt, 64 of a trace).",
        ),
    ] = None,
    speed: SpeedOption = float("inf"),
    rest_us: RestOption = 0.0,
    gpu: GpuOption = "auto",
    engine: EngineOption = SGLANG,
    policy: PolicyOption = None,
    allow_modelled: AllowModelledOption = False,
    measurements: MeasurementsOption = None,
    h_q: HeadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print attention and indexer time and peak workspace for chunk sizes from 1K to 64K, and the size to set.

    Prompts: so many at a time share each chunk evenly, nothing cached. A trace: replayed at each chunk size.

    Example: mla-tune chunks --model deepseek-v3.2 --gpu h200 --prompt 32768
    """
    if (trace is None) == (not prompt):
        raise UsageError(
            "chunk sizes are judged on prompts or a trace, one of the two: pass --prompt N or --trace FILE"
        )
    from mla_tune.cli.output import traffic_output
    from mla_tune.replay.chunks import CHUNK_SIZES, advise, chunk_size
    from mla_tune.replay.scheduler import MAX_REST_US

    longest = find_model(model).max_context
    if not 0 <= rest_us <= MAX_REST_US:
        raise UsageError(f"--rest-us must be microseconds, at least 0: got {rest_us}; accepted: 0 to {MAX_REST_US:g}")
    at_a_time = (1 if trace is None else 64) if concurrency is None else concurrency
    if trace is None:
        offered = _of_prompts(prompt or [], at_a_time, longest)
    else:
        offered = _of_trace(trace, at_a_time, speed, rest_us, longest)
    found = evidence(model, h_q, answering(Question(engine, gpu, policy, allow_modelled)), measurements)
    # Smaller chunks have no token for each of the prompts.
    tried = [size for size in CHUNK_SIZES if size >= at_a_time] or [CHUNK_SIZES[-1]]
    sizes = [chunk_size(found.pricer, size, offered.forwards(found.pricer, size), rest_us) for size in tried]
    advice = advise(sizes, found.pricer.tables.noise_band)
    said = f"{model}, h_q {found.pricer.tables.attention.h_q}, {found.sku}: {offered.label}"
    traffic_output.chunk_sizes(found.answering, sizes, advice, said, as_json)


def _of_prompts(texts: list[str], concurrency: int, longest: int) -> _Batched:
    """Prompts of stated lengths, ``concurrency`` of each at a time."""
    from mla_tune.replay.chunks import distribution

    prompts = [_prompts(text, longest) for text in texts]
    each = f"{concurrency} prompts of each at a time" if concurrency > 1 else "one prompt at a time"
    return _Batched(
        f"prompts of {', '.join(texts)} tokens, {each}",
        lambda _, size: distribution(prompts, size, concurrency),
    )


def _of_trace(path: Path, concurrency: int, speed: float, rest_us: float, longest: int) -> _Batched:
    """A trace, replayed with the incumbent's clock."""
    from mla_tune.cli import replaying
    from mla_tune.replay.prices import IncumbentClock
    from mla_tune.replay.scheduler import Server, replay

    offered = replaying.of_trace(path, speed, longest)

    def forwards(pricer: Pricer, size: int) -> Mapping[AnyShape, float]:
        return replay(offered.source, Server(size, concurrency, rest_us), IncumbentClock(pricer)).forwards()

    return _Batched(f"{offered.label}, concurrency {concurrency}", forwards)


def _prompts(text: str, longest: int) -> Prompts:
    """``TOKENS`` or ``TOKENS:WEIGHT``."""
    from mla_tune.replay.chunks import Prompts

    tokens, _, weight = text.partition(":")
    try:
        parsed = token_count(tokens), float(weight) if weight else 1.0
    except (ValueError, UsageError):
        raise UsageError(
            f"--prompt must be TOKENS or TOKENS:WEIGHT: got {text[:40]!r}; accepted: 131072, 8192:3"
        ) from None
    found = Prompts(*parsed)
    if found.tokens > longest:
        raise UsageError(f"--prompt must fit the model's context of {longest} tokens: got {str(found.tokens)[:20]}")
    return found
