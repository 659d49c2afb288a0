"""A replay and its judgement, as the commands on traffic share them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mla_tune.cli.priced import Evidence
from mla_tune.replay.agents import AgentMix, Agents
from mla_tune.replay.prices import IncumbentClock
from mla_tune.replay.requests import RequestSource
from mla_tune.replay.rule_comparison import Judgement, judge
from mla_tune.replay.scheduler import Replay, Server, replay
from mla_tune.replay.spot import FORMAT, VERSION, ForwardList, draw, write_forwards
from mla_tune.replay.trace import read_trace
from mla_tune.sites.served_shapes import ServedShape, bin_middle, bin_start, bounded, write_traffic
from mla_tune.sites.site import SiteName


@dataclass(frozen=True, slots=True)
class Offered:
    """Requests, and what to call them."""

    source: RequestSource
    label: str
    left_out: int = 0
    """Requests that are longer than the model's context."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What was replayed, how, and what every rule made of it."""

    evidence: Evidence
    offered: Offered
    engine: Server
    replay: Replay
    judgement: Judgement


def of_trace(path: Path, speed: float, max_context: int) -> Offered:
    """The requests of a trace that a model of ``max_context`` takes. Raises :class:`UsageError`."""
    trace = read_trace(path, speed).within(max_context)
    return Offered(trace, f"{path.name}, arrivals at speed {speed:g}", trace.left_out)


def of_mix(mix: AgentMix) -> Offered:
    """The requests of an agentic mix."""
    return Offered(
        Agents(mix),
        f"{mix.agents} agents of {mix.turns} turns, first prompt {mix.first_prompt}, {mix.turn_tokens} new tokens and "
        f"{mix.growth} of growth a turn, pauses of {mix.pause_us / 1e3:g} ms, seed {mix.seed}",
    )


def engine_label(engine: Server) -> str:
    """The server's settings in one line."""
    decode = f"{engine.decode_us:g} us a decode step" if engine.decode_us else "decoding elsewhere"
    return (
        f"chunks of {engine.chunk_tokens}, concurrency {engine.concurrency}, rest of the model {engine.rest_us:g} us a "
        f"forward and {engine.rest_us_per_token:g} us a token, {decode}"
    )


def judged(evidence: Evidence, offered: Offered, engine: Server) -> Judged:
    """Replay ``offered`` by the incumbent's clock, and judge every rule on the forwards."""
    replayed = replay(offered.source, engine, IncumbentClock(evidence.pricer))
    return Judged(evidence, offered, engine, replayed, judge(evidence.pricer, replayed.forwards()))


def drawn(told: Judged, count: int, seed: int, path: Path | None) -> ForwardList:
    """Forwards of the replay, written to ``path`` if there is one."""
    table = told.evidence.pricer.tables.attention
    found = ForwardList(
        format=FORMAT,
        version=VERSION,
        model=table.model,
        h_q=table.h_q or 0,
        source=f"{told.offered.label}; {engine_label(told.engine)}",
        seed=seed,
        forwards=draw(told.replay.forwards(), count, seed),
    )
    if path is not None:
        write_forwards(path, found)
    return found


def record(told: Judged, path: Path) -> None:
    """Write the forwards as a server does (:mod:`mla_tune.sites.served_shapes`), once for either site."""
    model = told.evidence.pricer.model.name
    cells: Counter[ServedShape] = Counter()
    for forward, occurred in told.replay.forwards().items():
        sizes = (forward.num_qo_tokens, forward.kv_tokens, forward.num_reqs)
        num_qo_tokens, kv_tokens, num_reqs = (bin_middle(bin_start(size)) for size in sizes)
        for site in SiteName:
            cells[ServedShape(str(site), model, num_qo_tokens, kv_tokens, num_reqs)] += occurred
    write_traffic(path, bounded(dict(cells)))
