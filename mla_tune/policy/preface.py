"""The comment at the top of a policy's file: what it does and wins, what it rests on, how to read and to check it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import PolicyEvidence, Slowdown
from mla_tune.policy.file_form import written_tokens
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import SGLANG_KERNEL
from mla_tune.sites.site import FORWARD, MODELS, SiteName

_COLUMNS = 118
TOLD_CONTEXTS = (8 << 10, 128 << 10, 1 << 20)
"""Context tokens at which a model's choices are told."""


def preface(policy: Policy, evidence: PolicyEvidence | None) -> Iterator[str]:
    """Its lines, without the mark of a comment; at most 20 for every model that there is."""
    for paragraph in _paragraphs(policy, evidence):
        yield from textwrap.wrap(paragraph, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False)


def _paragraphs(policy: Policy, evidence: PolicyEvidence | None) -> Iterator[str]:
    gpu, environment = policy.gpu, policy.environment
    where = "CPU threads" if gpu.sku == "cpu" else "SMs"
    yield f"mla-tune: what serves on {' and '.join(gpu.skus)}, {gpu.sm_count} {where}. Generated, do not edit."
    if policy.scaled_from is not None:
        widths = [entry.relative for table in evidence.tables for entry in table.uncertainty] if evidence else []
        off = f", here by exp({min(widths):.2f}) to exp({max(widths):.2f})" if widths else ""
        yield (
            f"WARNING: modelled, not measured: no kernel was timed on this GPU. The costs are those of "
            f"{policy.scaled_from}, scaled by datasheet figures, and may be off both ways{off}. Sweep this GPU before you "
            "rely on them."
        )
    builds = ", ".join(f"{library.name} {library.version}" for library in environment.libraries) or "no kernel library"
    around = f", around attention the kernels of {policy.provider}" if policy.provider else ""
    if f"+{SGLANG_KERNEL}@" in (policy.provider or ""):
        around += (
            f"; V3.2's timings hold that {SGLANG_KERNEL}'s top-k transform, its tables serve with any other release"
        )
    yield (
        f"Rests on {policy.source.measurements} timings ({policy.regime} time) on {policy.scaled_from or gpu.sku} with "
        f"driver {environment.driver or '-'}, torch {environment.torch}, {builds}{around}."
    )
    yield from _told(policy)
    if evidence is not None and evidence.overall is not None:
        ours, *others = evidence.overall.slowdown
        yield (
            f"On {evidence.overall.points} held-out shapes of single layers the policy takes {_times(ours)} the time of "
            f"the fastest path; {'; '.join(f'{rule.rule}: {_times(rule)}' for rule in others)}."
        )
    yield (
        "To read a table: the last requests_from and context_from that are reached say which lines count; of these the "
        "last whose query_tokens_from is reached. {1K: 15, 80K: 54} is 15 query tokens at 1K (1024) tokens of context, "
        "evenly rising to 54 at 80K. Outside measured ranges, and past a candidate's limit, the incumbent is kept."
    )
    yield f"Made by: {policy.source.command}"
    yield "Check: mla-tune fit --check THIS_FILE. Held-out tables, brackets and limits: the evidence.json beside it."


def _times(rule: Slowdown) -> str:
    return f"{rule.mean:.3f} (at worst {rule.worst:.2f}) times"


def _told(policy: Policy) -> Iterator[str]:
    """What is chosen for each model in a whole forward of one request."""
    key = SiteName.PREFILL_ATTENTION, FORWARD, Engine.SGLANG
    told = [table for table in policy.tables if (table.site, table.layer, table.engine) == key]
    if told:
        yield "What it takes for a whole forward of one request:"
    for table in told:
        yield f"{table.model}, {table.h_q} heads: {_by_context(table)}."
    indexer = [table for table in policy.tables if table.site == SiteName.INDEXER_METADATA]
    taken = {choice.candidate for table in indexer for row in table.rows for choice in row.choices}
    if indexer:
        yield f"Indexer metadata: {' or '.join(sorted(taken))}{' always' if len(taken) == 1 else ', by the tables below'}."


def _by_context(table: Table) -> str:
    """``sparse_fwd from 17 query tokens at 8K context, 39 at 128K; below with_kvcache``."""
    if {limit.candidate for limit in table.limits} == set(table.candidates):
        return "nothing that runs at every length"
    low, high = table.measured.kv_tokens
    longest = min(high, MODELS[table.model].max_context)
    contexts = [kv for kv in TOLD_CONTEXTS if low <= kv <= longest] or [low]
    found = [choices_at(table, kv) for kv in contexts]
    names = {tuple(candidate for _, candidate in choices) for choices in found}
    if names == {(found[0][0][1],)}:
        return f"{found[0][0][1]} at every length"
    if len(names) == 1 and len(found[0]) == 2:
        below, above = found[0][0][1], found[0][1][1]
        counts = [f"{choices[1][0]} at {written_tokens(kv)}" for kv, choices in zip(contexts, found, strict=True)]
        first, *others = counts
        said = ", ".join([first.replace(" at ", " query tokens at ", 1) + " context", *others])
        return f"{above} from {said}; below {below}"
    return "; ".join(
        f"at {written_tokens(kv)} of context {', '.join(f'{name} from {count}' for count, name in choices)} query tokens"
        for kv, choices in zip(contexts, found, strict=True)
    )


def choices_at(table: Table, kv_tokens: int) -> list[tuple[int, str]]:
    """Query tokens from which each candidate is taken for one request of this context."""
    choose, (low, high) = Decision(table).choose, table.measured.num_qo_tokens
    rows = [row for row in table.rows if row.num_reqs_from <= 1 and row.kv_tokens_from <= kv_tokens]
    starts = {choice.threshold.at(kv_tokens) for choice in rows[-1].choices}
    found: list[tuple[int, str]] = []
    for count in sorted({low, *(start for start in starts if low <= start <= min(high, kv_tokens))}):
        candidate = choose(count, kv_tokens, 1)
        if not found or candidate != found[-1][1]:
            found.append((count, candidate))
    return found
