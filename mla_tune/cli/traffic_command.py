"""The command ``traffic``: what the policy and every baseline make of real requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.answering import AllowModelledOption, EngineOption, GpuOption, PolicyOption, Question, answering
from mla_tune.cli.options import (
    DEFAULT_TIMEOUT_S,
    JsonOption,
    TimeoutOption,
    parsed_count,
    positive_seconds,
)
from mla_tune.cli.policies import HeadsOption, MeasurementsOption, ModelOption
from mla_tune.cli.priced import evidence
from mla_tune.errors import UsageError
from mla_tune.sites.provider import SGLANG
from mla_tune.sites.site import model as find_model

TraceOption = Annotated[
    Path | None, typer.Option("--trace", help="Requests in Mooncake's JSON lines (gzip is read too).")
]
ChunkOption = Annotated[
    int, typer.Option("--chunk", parser=parsed_count, metavar="TOKENS", help="Most query tokens of a prefill forward.")
]
ConcurrencyOption = Annotated[
    int,
    typer.Option("--concurrency", parser=parsed_count, metavar="COUNT", help="Most requests in the server at a time."),
]
SpeedOption = Annotated[
    float, typer.Option("--speed", help="Divides a trace's arrival times; inf: all requests wait from the start.")
]
RestOption = Annotated[float, typer.Option("--rest-us", help="Time of the rest of the model per prefill forward, us.")]
RestTokenOption = Annotated[float, typer.Option("--rest-us-per-token", help="The same per query token, us.")]
DecodeOption = Annotated[
    float, typer.Option("--decode-us", help="Time of a decode step, us; 0: another server decodes.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of the agentic mix and of the drawn forwards.")]
_AgentsOption = Annotated[
    int | None,
    typer.Option(
        "--agents",
        parser=parsed_count,
        metavar="COUNT",
        help="Instead of a trace: so many agentic sessions at a time.",
    ),
]
_TurnsOption = Annotated[
    int, typer.Option("--turns", parser=parsed_count, metavar="COUNT", help="Turns of each agentic session.")
]
_FirstPromptOption = Annotated[
    int,
    typer.Option(
        "--first-prompt", parser=parsed_count, metavar="TOKENS", help="Mean tokens of a session's first prompt."
    ),
]
_TurnTokensOption = Annotated[
    int,
    typer.Option(
        "--turn-tokens", parser=parsed_count, metavar="TOKENS", help="Mean new prompt tokens of a later turn."
    ),
]
_GrowthOption = Annotated[
    int,
    typer.Option(
        "--growth", parser=parsed_count, metavar="TOKENS", help="Mean growth of a context per turn, answers included."
    ),
]
_PauseOption = Annotated[float, typer.Option("--pause-ms", help="Mean pause between a session's turns, ms.")]
_RecordOption = Annotated[
    Path | None, typer.Option("--record", help="Write the forwards as MLA_TUNE_RECORD does in a server.")
]
_SpotOption = Annotated[
    int | None,
    typer.Option(
        "--spot-check",
        parser=parsed_count,
        metavar="COUNT",
        help="Draw so many of the forwards, for --forwards or --measure.",
    ),
]
_ForwardsOption = Annotated[Path | None, typer.Option("--forwards", help="Write the drawn forwards to this file.")]
_MeasureOption = Annotated[bool, typer.Option("--measure", help="Time the drawn forwards on this machine.")]


def traffic(
    model: ModelOption,
    trace: TraceOption = None,
    agents: _AgentsOption = None,
    turns: _TurnsOption = 40,
    first_prompt: _FirstPromptOption = 20_000,
    turn_tokens: _TurnTokensOption = 500,
    growth: _GrowthOption = 1500,
    pause_ms: _PauseOption = 3000.0,
    gpu: GpuOption = "auto",
    engine: EngineOption = SGLANG,
    policy: PolicyOption = None,
    allow_modelled: AllowModelledOption = False,
    measurements: MeasurementsOption = None,
    h_q: HeadsOption = None,
    chunk: ChunkOption = 8192,
    concurrency: ConcurrencyOption = 64,
    speed: SpeedOption = 1.0,
    rest_us: RestOption = 0.0,
    rest_us_per_token: RestTokenOption = 0.0,
    decode_us: DecodeOption = 0.0,
    seed: SeedOption = 0,
    record: _RecordOption = None,
    spot_check: _SpotOption = None,
    forwards: _ForwardsOption = None,
    measure: _MeasureOption = False,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Replay requests through a server's batching, and judge the policy and every baseline on the forwards.

    Example: mla-tune traffic --model deepseek-v4-pro --gpu h200 --agents 16
    """
    _check_purpose(trace, agents, spot_check, drawn_for=forwards is not None or measure)
    positive_seconds("--timeout", timeout)
    from mla_tune.cli import replaying, spotting
    from mla_tune.cli.output import traffic_output
    from mla_tune.replay.agents import AgentMix
    from mla_tune.replay.scheduler import Server

    settings = Server(chunk, concurrency, rest_us, rest_us_per_token, decode_us)
    longest = find_model(model).max_context
    if trace is not None:
        offered = replaying.of_trace(trace, speed, longest)
    else:
        mix = AgentMix(agents or 0, turns, first_prompt, turn_tokens, growth, pause_ms * 1e3, longest, seed)
        offered = replaying.of_mix(mix)
    answers = answering(Question(engine, gpu, policy, allow_modelled))
    found = evidence(model, h_q, answers, measurements)
    told = replaying.judged(found, offered, settings)
    if record is not None:
        replaying.record(told, record)
    drawn = None if spot_check is None else replaying.drawn(told, spot_check, seed, forwards)
    compared = spotting.measured(found, drawn, gpu, timeout, quiet=as_json) if drawn and measure else None
    traffic_output.report(told, compared, as_json)


def _check_purpose(trace: Path | None, agents: int | None, spot_check: int | None, drawn_for: bool) -> None:
    if (trace is None) == (agents is None):
        raise UsageError("traffic is a trace or an agentic mix, one of the two: pass --trace FILE or --agents N")
    if (spot_check is not None) != drawn_for:
        raise UsageError(
            "forwards are drawn for a purpose: pass --spot-check N with --forwards FILE, --measure or both"
        )
