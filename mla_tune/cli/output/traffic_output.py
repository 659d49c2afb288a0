"""What the commands on traffic print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table as RichTable

from mla_tune.cli.output.render import console, header
from mla_tune.cli.replaying import Judged, engine_label

if TYPE_CHECKING:
    from mla_tune.cli.answering import Answering
    from mla_tune.replay.chunks import Advice, ChunkSize
    from mla_tune.replay.rule_comparison import RuleTotal
    from mla_tune.replay.spot_result import Comparison

_MIB = float(1 << 20)


def percent(change: float) -> str:
    """A signed percentage; what rounds to zero is zero."""
    text = f"{change:+.2%}"
    return "0.00%" if text in ("+0.00%", "-0.00%") else text


def report(told: Judged, compared: Comparison | None, as_json: bool) -> None:
    """Every rule on the replayed forwards, and what a spot check of them found."""
    if as_json:
        print(json.dumps(_report_json(told, compared)))
        return
    replay, judgement = told.replay, told.judgement
    table = told.evidence.pricer.tables.attention
    computed = replay.prompt_tokens - replay.cached_tokens
    header(told.evidence.answering)
    console.print(f"{told.offered.label}; {engine_label(told.engine)}", highlight=False)
    console.print(
        f"{len(replay.served)} requests, {replay.prompt_tokens} prompt tokens, {_share(replay.cached_tokens, computed)} of "
        f"them from the prefix cache, the rest in {judgement.forwards} prefill forwards ({judgement.distinct} distinct, "
        f"{replay.full_share(told.engine.chunk_tokens):.1%} full chunks, {judgement.outside:.1%} outside the measured "
        "ranges)",
        highlight=False,
    )
    if told.offered.left_out:
        console.print(
            f"{told.offered.left_out} requests were left out: longer than the model's context", highlight=False
        )
    title = f"{table.model}, h_q {table.h_q}, {told.evidence.sku}: attention and indexer metadata of all forwards"
    rows = RichTable(
        "rule", "attention, s", "indexer, s", "total", "p50, ms", "p99, ms", "differs from incumbent", title=title
    )
    for entry in judgement.rules:
        rows.add_row(*_rule_row(entry, judgement.incumbent))
    console.print(rows)
    console.print(
        "total: against the incumbent; times are predicted from the measurements behind the policy; first calls on new "
        "shapes are not counted",
        highlight=False,
    )
    if compared is not None:
        comparison(compared)


def _share(part: int, rest: int) -> str:
    return f"{part / (part + rest):.1%}"


def _rule_row(entry: RuleTotal, incumbent: RuleTotal) -> Sequence[str]:
    name = f"{entry.rule} (incumbent)" if entry.is_incumbent else entry.rule
    differs = f"{entry.differs:.1%}"
    if entry.total_us is None or entry.attention_us is None or entry.metadata_us is None:
        return (name, "-", "-", f"fails at {entry.failing} forwards", "-", "-", differs)
    change = "-" if incumbent.total_us is None else percent(entry.total_us / incumbent.total_us - 1)
    times = (f"{(us or 0.0) / 1e3:.2f}" for us in (entry.p50_us, entry.p99_us))
    return (name, f"{entry.attention_us / 1e6:.3f}", f"{entry.metadata_us / 1e6:.3f}", change, *times, differs)


def _report_json(told: Judged, compared: Comparison | None) -> dict[str, object]:
    replay, table = told.replay, told.evidence.pricer.tables.attention
    incumbent_us = told.judgement.incumbent.total_us
    return {
        "traffic": told.offered.label,
        "engine": asdict(told.engine),
        "model": table.model,
        "h_q": table.h_q,
        "gpu": told.evidence.sku,
        "policy": told.evidence.policy,
        "answered_by": told.evidence.answering.as_json(),
        "requests": len(replay.served),
        "left_out": told.offered.left_out,
        "prompt_tokens": replay.prompt_tokens,
        "cached_tokens": replay.cached_tokens,
        "forwards": told.judgement.forwards,
        "distinct_forwards": told.judgement.distinct,
        "full_chunks": replay.full_share(told.engine.chunk_tokens),
        "outside_measured": told.judgement.outside,
        "rules": [
            {**asdict(entry), "total_us": entry.total_us, "against_incumbent": _ratio(entry.total_us, incumbent_us)}
            for entry in told.judgement.rules
        ],
        "spot_check": None if compared is None else comparison_json(compared),
    }


def _ratio(us: float | None, incumbent_us: float | None) -> float | None:
    return None if us is None or incumbent_us is None else us / incumbent_us - 1


def spot_check(found: Answering, compared: Comparison, as_json: bool) -> None:
    """Whose predictions they are, and how they compare."""
    if as_json:
        print(json.dumps({**comparison_json(compared), "answered_by": found.as_json()}))
        return
    header(found)
    comparison(compared)


def comparison(compared: Comparison) -> None:
    """Predicted against measured, forward by forward and over all of them."""
    lines = RichTable(
        "requests", "query tokens", "context tokens", "layers", "candidate", "predicted, us", "measured, us", "ratio"
    )
    for line in compared.lines:
        shape = line.shape
        measured = "-" if line.measured_us is None else f"{line.measured_us:.1f}"
        ratio = f"{line.predicted_us / line.measured_us:.3f}" if line.measured_us else "-"
        sizes = (str(shape.num_reqs), str(shape.num_qo_tokens), str(shape.kv_tokens))
        lines.add_row(*sizes, line.layer, line.candidate, f"{line.predicted_us:.1f}", measured, ratio)
    console.print(lines)
    accuracy = RichTable("layers", "candidate", "forwards", "median", "p5", "p95", title="predicted over measured")
    for entry in compared.accuracy:
        values = (f"{value:.3f}" for value in (entry.median, entry.p5, entry.p95))
        accuracy.add_row(entry.layer, entry.candidate, str(entry.forwards), *values)
    console.print(accuracy)
    judged = RichTable("rule", "measured, ms", "slower beyond noise at", "worst slowdown")
    for rule in compared.rules:
        judged.add_row(rule.rule, f"{rule.measured_us / 1e3:.2f}", str(rule.slower_at), f"{rule.worst:.3f}")
    console.print(judged)
    console.print(
        f"{compared.complete} of {compared.forwards} forwards ran with every candidate in every layer type",
        highlight=False,
    )


def comparison_json(compared: Comparison) -> dict[str, object]:
    """A spot check for scripts."""
    return asdict(compared)


def chunk_sizes(found: Answering, sizes: Sequence[ChunkSize], advice: Advice, said: str, as_json: bool) -> None:
    """Time and workspace at each chunk size, and the size to set."""
    if as_json:
        told = {"prompts": said, "sizes": [asdict(size) for size in sizes], "advice": asdict(advice)}
        print(json.dumps({**told, "answered_by": found.as_json()}))
        return
    header(found)
    table = RichTable(
        "chunk", "forwards", "policy, ms", "workspace, MiB", "choice", "incumbent, ms", "workspace, MiB", title=said
    )
    for size in sizes:
        policy, engine = size.policy, size.incumbent
        incumbent = ("fails", "-") if engine is None else _time_and_bytes(engine.time_us, engine.workspace_bytes)
        own = _time_and_bytes(policy.time_us, policy.workspace_bytes)
        table.add_row(str(size.chunk_tokens), f"{size.forwards:g}", *own, ", ".join(policy.candidates), *incumbent)
    console.print(table)
    by_size = {size.chunk_tokens: size for size in sizes}
    if {8192, 32768} <= set(by_size):
        small, large = by_size[8192].policy, by_size[32768].policy
        console.print(
            f"32768 against 8192: {percent(large.time_us / small.time_us - 1)} of time, "
            f"{large.workspace_bytes / small.workspace_bytes:.2f} x the workspace",
            highlight=False,
        )
    rest_us = sizes[0].rest_us / sizes[0].forwards
    console.print(
        f"set {advice.chunk_tokens}: {advice.reason}; with {rest_us:g} us a forward for the rest of the model (--rest-us)",
        highlight=False,
    )


def _time_and_bytes(time_us: float, workspace_bytes: int) -> tuple[str, str]:
    return f"{time_us / 1e3:.1f}", f"{workspace_bytes / _MIB:.1f}"
