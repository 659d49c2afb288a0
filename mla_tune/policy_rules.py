"""What a policy must satisfy beyond its types. Each broken rule is a :class:`Problem`; a valid policy has none."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from mla_tune.engine import Engine, engine_choice, engine_heads, table_engine
from mla_tune.policy_yaml import MAX_INT64, shown
from mla_tune.site import FORWARD, MODELS, ModelConfig, SiteName

if TYPE_CHECKING:
    from mla_tune.policy import HeldOut, Ineligible, Limit, Policy, Range, Row, Table

EVIDENCE = ("measured", "modelled")
REGIMES = ("graph", "eager")
POLICY_RULE = "policy"
"""The rule name of the policy's own row in a held-out table."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule. ``path`` is the place in the file, such as ``tables[3].rows[0].choices[1].candidate``."""

    path: str
    text: str
    """The rule, the value and what is accepted."""


def problems(policy: Policy) -> Iterator[Problem]:
    """Everything that is wrong with ``policy``, in the order of the file."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", policy.gpu.sku):
        yield Problem("gpu.sku", f"must be a canonical SKU name: got {shown(policy.gpu.sku)}; accepted: nvidia-h200")
    yield from _number("gpu.sm_count", policy.gpu.sm_count, low=1)
    yield from _one_of("evidence", policy.evidence, EVIDENCE)
    yield from _one_of("regime", policy.regime, REGIMES)
    yield from _number("environment.shared_memory_optin_bytes", policy.environment.shared_memory_optin_bytes, low=0)
    for index, library in enumerate(policy.environment.libraries):
        if not library.name:
            yield Problem(f"environment.libraries[{index}].name", "must be a distribution name: got ''")
    yield from _unique("environment.libraries", [library.name for library in policy.environment.libraries])
    yield from _number("source.measurements", policy.source.measurements, low=1)
    if not policy.tables:
        yield Problem("tables", "must hold at least one table: got none")
    yield from _unique(
        "tables", [(table.site, table.model, table.h_q, table.layer, table.engine) for table in policy.tables]
    )
    for index, table in enumerate(policy.tables):
        yield from _table(f"tables[{index}]", table, measured=policy.evidence == "measured")


def _table(path: str, table: Table, *, measured: bool) -> Iterator[Problem]:
    wrong_keys = list(_keys(path, table))
    yield from wrong_keys
    if wrong_keys:  # the rules below need a known site and model
        return
    known = accepted_candidates(SiteName(table.site), MODELS[table.model], table.engine)
    if not table.candidates:
        yield Problem(f"{path}.candidates", f"must name at least one: got none; accepted: {', '.join(known)}")
    for index, candidate in enumerate(table.candidates):
        yield from _one_of(f"{path}.candidates[{index}]", candidate, known)
    yield from _unique(f"{path}.candidates", table.candidates)
    yield from _one_of(f"{path}.incumbent", table.incumbent, table.candidates)
    if not 0 <= table.noise_band < 1:
        yield Problem(f"{path}.noise_band", f"must be a relative difference in [0, 1): got {table.noise_band}")
    yield from _measured(f"{path}.measured", table.measured)
    for index, limit in enumerate(table.limits):
        yield from _limit(f"{path}.limits[{index}]", limit, table.candidates)
    for index, entry in enumerate(table.ineligible):
        yield from _ineligible(f"{path}.ineligible[{index}]", entry, table)
    barred = {entry.candidate for entry in table.ineligible}
    yield from _rows(f"{path}.rows", table.rows, [name for name in table.candidates if name not in barred])
    yield from _held_out(f"{path}.held_out", table.held_out, measured=measured)


def _keys(path: str, table: Table) -> Iterator[Problem]:
    yield from _one_of(f"{path}.site", table.site, list(SiteName))
    yield from _one_of(f"{path}.model", table.model, MODELS)
    if table.site not in list(SiteName) or table.model not in MODELS:
        return
    site, model = SiteName(table.site), MODELS[table.model]
    yield from _one_of(f"{path}.layer", table.layer, [*model.site_layers(site), FORWARD])
    engines = accepted_engines(site, model)
    yield from _one_of(f"{path}.engine", str(table.engine), engines)
    if table.engine not in engines:
        return
    heads = accepted_heads(site, model, table.engine)
    if table.h_q not in heads:
        accepted = ", ".join("null" if h_q is None else str(h_q) for h_q in heads)
        yield Problem(f"{path}.h_q", f"must be one that {model.name} has there: got {table.h_q}; accepted: {accepted}")


def accepted_engines(site: SiteName, model: ModelConfig) -> tuple[Engine, ...]:
    """Engines that may have tables of their own for ``site`` and ``model``."""
    return tuple(engine for engine in Engine if table_engine(engine, site, model) is engine)


def accepted_heads(site: SiteName, model: ModelConfig, engine: Engine = Engine.SGLANG) -> tuple[int | None, ...]:
    """Head counts that tables of ``site`` and ``model`` may have; the one None where heads play no role."""
    return (None,) if site is SiteName.INDEXER_METADATA else engine_heads(engine, model)


def accepted_candidates(site: SiteName, model: ModelConfig, engine: Engine) -> tuple[str, ...]:
    """Candidates that ``engine`` can take somewhere in ``model``, sorted."""
    names = {name for layer in model.site_layers(site) for name in engine_choice(engine, site, layer).candidates}
    return tuple(sorted(names))


def _measured(path: str, measured: Range) -> Iterator[Problem]:
    for name, (low, high) in (("num_qo_tokens", measured.num_qo_tokens), ("kv_tokens", measured.kv_tokens)):
        if not 1 <= low <= high <= MAX_INT64:
            yield Problem(f"{path}.{name}", f"must be a range [low, high] with 1 <= low <= high: got [{low}, {high}]")


def _limit(path: str, limit: Limit, candidates: Collection[str]) -> Iterator[Problem]:
    yield from _one_of(f"{path}.candidate", limit.candidate, candidates)
    yield from _number(f"{path}.num_qo_tokens", limit.num_qo_tokens, low=0)
    yield from _number(f"{path}.fails_at", limit.fails_at, low=limit.num_qo_tokens + 1)


def _ineligible(path: str, entry: Ineligible, table: Table) -> Iterator[Problem]:
    others = [name for name in table.candidates if name != table.incumbent]
    yield from _one_of(f"{path}.candidate", entry.candidate, others)
    if not 0 <= entry.bound_s < entry.first_call_s < math.inf:
        rule = f"must be finite seconds above bound_s={entry.bound_s}"
        yield Problem(f"{path}.first_call_s", f"{rule}: got {entry.first_call_s}")


def _rows(path: str, rows: tuple[Row, ...], candidates: Collection[str]) -> Iterator[Problem]:
    if not rows:
        yield Problem(path, "must hold at least one row: got none")
    yield from _ascending(path, "kv_tokens_from", [row.kv_tokens_from for row in rows])
    for index, row in enumerate(rows):
        yield from _choices(f"{path}[{index}].choices", row, candidates)


def _choices(path: str, row: Row, candidates: Collection[str]) -> Iterator[Problem]:
    choices = row.choices
    if not choices:
        yield Problem(path, "must hold at least one choice: got none")
    yield from _ascending(path, "num_qo_tokens_from", [choice.num_qo_tokens_from for choice in choices])
    for index, choice in enumerate(choices):
        place = f"{path}[{index}]"
        yield from _one_of(f"{place}.candidate", choice.candidate, candidates)
        if index and choice.candidate == choices[index - 1].candidate:
            yield Problem(f"{place}.candidate", f"must differ from the choice before it: got {choice.candidate} twice")
        if choice.bracket is None:
            continue
        low, high = choice.bracket
        if not index:
            yield Problem(f"{place}.bracket", f"must be absent on the first choice of a row: got [{low}, {high}]")
        # The new candidate may start right after the last count at which the previous one was still as good.
        if not 0 <= low <= choice.num_qo_tokens_from <= high + 1 or not low <= high <= MAX_INT64:
            rule = f"must be [low, high] around num_qo_tokens_from={choice.num_qo_tokens_from}"
            yield Problem(f"{place}.bracket", f"{rule}: got [{low}, {high}]")


def _held_out(path: str, held_out: HeldOut, *, measured: bool) -> Iterator[Problem]:
    # Nobody has points of a GPU that nobody had: only a modelled policy may be without them.
    yield from _number(f"{path}.points", held_out.points, low=1 if measured else 0)
    rules = [entry.rule for entry in held_out.slowdown]
    if held_out.points and POLICY_RULE not in rules:
        yield Problem(f"{path}.slowdown", f"must have the rule {POLICY_RULE!r}: got {shown(rules)}")
    yield from _unique(f"{path}.slowdown", rules)
    for index, entry in enumerate(held_out.slowdown):
        for name in ("geomean", "mean", "p95", "worst"):
            value = getattr(entry, name)
            if not (math.isfinite(value) and value >= 1):
                rule = "must be a slowdown, finite and at least 1.0"
                yield Problem(f"{path}.slowdown[{index}].{name}", f"{rule}: got {value}")


def _one_of(path: str, value: str, accepted: Collection[str]) -> Iterator[Problem]:
    if value not in accepted:
        yield Problem(path, f"must be a known one: got {shown(value)}; accepted: {', '.join(accepted)}")


def _number(path: str, value: int, *, low: int) -> Iterator[Problem]:
    if not low <= value <= MAX_INT64:
        yield Problem(path, f"must be at least {low} and fit in 64 bits: got {value}")


def _unique(path: str, values: Iterable[object]) -> Iterator[Problem]:
    seen = set()
    for index, value in enumerate(values):
        if value in seen:
            yield Problem(f"{path}[{index}]", f"must not repeat an earlier entry: got {shown(value)} again")
        seen.add(value)


def _ascending(path: str, name: str, starts: list[int]) -> Iterator[Problem]:
    if starts and starts[0] != 0:
        yield Problem(f"{path}[0].{name}", f"must be 0 on the first entry: got {starts[0]}")
    for index, (before, start) in enumerate(pairwise(starts), 1):
        if not before < start <= MAX_INT64:
            yield Problem(f"{path}[{index}].{name}", f"must be above the entry before it ({before}): got {start}")
