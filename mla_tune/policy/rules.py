"""What a policy must satisfy beyond its types. Each broken rule is a :class:`Problem`; a valid policy has none."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

import msgspec

from mla_tune.hardware.builds import Build
from mla_tune.policy.kernel_config import kernel_config_fault
from mla_tune.policy.text import MAX_INT64, shown
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.engines import Engine, engine_choice, engine_heads, table_engine
from mla_tune.sites.provider import is_provider_key
from mla_tune.sites.site import FORWARD, MODELS, OVERLAPS, ModelConfig, SiteName

if TYPE_CHECKING:
    from mla_tune.policy.evidence import TrafficWeights, WorkspaceCap
    from mla_tune.policy.schema import Choice, HeldOut, Ineligible, Limit, Policy, Range, Row, Table

EVIDENCE = ("measured", "modelled")
REGIMES = ("graph", "eager")
CENSORED = ("above", "below")
_BUILD = "accepted: a form like sgl-flash-mla==1.0.0"
POLICY_RULE = "policy"
"""The rule name of the policy's own row in a held-out table."""


class Problem(msgspec.Struct, frozen=True):
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
    if policy.overlap not in OVERLAPS:
        accepted = ", ".join(map(str, OVERLAPS))
        yield Problem("overlap", f"must be one that inputs are built with: got {policy.overlap}; accepted: {accepted}")
    if policy.provider is not None and not is_provider_key(policy.provider):
        accepted = "sglang@VERSION, sglang@VERSION+sglang-kernel@VERSION"
        yield Problem("provider", f"must be the key of a provider: got {shown(policy.provider)}; accepted: {accepted}")
    for index, entry in enumerate(policy.kernel_config):
        reason = kernel_config_fault(entry)
        if reason is not None:
            yield Problem(f"kernel_config[{index}]", f"must be launch parameters of a kernel: {reason}")
    yield from _unique("kernel_config", [(entry.kernel, entry.size_from) for entry in policy.kernel_config])
    yield from _modelled(policy)
    if policy.objective is not None:
        yield from _weights(policy.objective)
    if not policy.tables:
        yield Problem("tables", "must hold at least one table: got none")
    yield from _unique(
        "tables", [(table.site, table.model, table.h_q, table.layer, table.engine) for table in policy.tables]
    )
    for index, table in enumerate(policy.tables):
        yield from _table(f"tables[{index}]", table, measured=policy.evidence == "measured")


def _modelled(policy: Policy) -> Iterator[Problem]:
    stated, modelled = policy.modelled, policy.evidence == "modelled"
    if (stated is not None) != modelled:
        rule = "must be there exactly where evidence is modelled"
        yield Problem("modelled", f"{rule}: got {'none' if stated is None else 'it'} with evidence {policy.evidence}")
    if stated is None:
        return
    yield from _number("modelled.scaled_from.sm_count", stated.scaled_from.sm_count, low=1)
    for index, entry in enumerate(stated.stages):
        yield from _finite(f"modelled.stages[{index}].measured", entry.measured)
        yield from _finite(f"modelled.stages[{index}].scaled", entry.scaled)


def _weights(weights: TrafficWeights) -> Iterator[Problem]:
    if not re.fullmatch(r"[0-9a-f]{64}", weights.traffic):
        yield Problem("objective.traffic", f"must be a SHA-256 in hexadecimal: got {shown(weights.traffic)}")
    yield from _number("objective.forwards", weights.forwards, low=1)
    if not 0 < weights.uniform_share <= 1:
        yield Problem("objective.uniform_share", f"must be a share in (0, 1]: got {weights.uniform_share}")


def _workspace_cap(path: str, cap: WorkspaceCap) -> Iterator[Problem]:
    yield from _number(f"{path}.max_bytes", cap.max_bytes, low=1)
    if not 0 <= cap.exempt <= cap.over <= cap.shapes <= MAX_INT64:
        got = f"exempt {cap.exempt}, over {cap.over}, shapes {cap.shapes}"
        yield Problem(path, f"must count 0 <= exempt <= over <= shapes: got {got}")


def _finite(path: str, value: float) -> Iterator[Problem]:
    if not 0 <= value < math.inf:
        yield Problem(path, f"must be a relative error, finite and at least 0: got {value}")


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
    yield from _builds(path, table)
    bound = 1.0 if measured else math.inf  # a model may be off by more than a timing can scatter
    if not 0 <= table.noise_band < bound:
        yield Problem(f"{path}.noise_band", f"must be a relative difference in [0, {bound:g}): got {table.noise_band}")
    if table.uncertainty and measured:
        yield Problem(f"{path}.uncertainty", "must be absent from a measured table: got one")
    yield from _unique(f"{path}.uncertainty", [stated.candidate for stated in table.uncertainty])
    for index, stated in enumerate(table.uncertainty):
        yield from _one_of(f"{path}.uncertainty[{index}].candidate", stated.candidate, table.candidates)
        yield from _finite(f"{path}.uncertainty[{index}].relative", stated.relative)
    yield from _measured(f"{path}.measured", table.measured)
    if table.workspace_cap is not None:
        yield from _workspace_cap(f"{path}.workspace_cap", table.workspace_cap)
    for index, limit in enumerate(table.limits):
        yield from _limit(f"{path}.limits[{index}]", limit, table.candidates)
    for index, entry in enumerate(table.ineligible):
        yield from _ineligible(f"{path}.ineligible[{index}]", entry, table)
    barred = {entry.candidate for entry in table.ineligible}
    served = [name for name in table.candidates if name not in barred]
    wrong_rows = list(_rows(f"{path}.rows", table.rows, served))
    yield from wrong_rows or _crossing(f"{path}.rows", table)
    yield from _held_out(f"{path}.held_out", table.held_out, measured=measured)


def _builds(path: str, table: Table) -> Iterator[Problem]:
    yield from _build_names(f"{path}.builds", table.builds)
    others = [name for name in table.candidates if name != table.incumbent]
    yield from _unique(f"{path}.candidate_builds", [entry.candidate for entry in table.candidate_builds])
    for index, entry in enumerate(table.candidate_builds):
        below = f"{path}.candidate_builds[{index}]"
        if entry.candidate not in others:
            rule = "must be another candidate of the table than its incumbent"
            yield Problem(f"{below}.candidate", f"{rule}: got {shown(entry.candidate)}; accepted: {', '.join(others)}")
        if not entry.builds:
            yield Problem(f"{below}.builds", "must name at least one build: got none")
        yield from _build_names(f"{below}.builds", entry.builds)
        for build in sorted(set(entry.builds) & set(table.builds)):
            yield Problem(f"{below}.builds", f"must name what the table itself does not: got {build} in both")


def _build_names(path: str, builds: tuple[str, ...]) -> Iterator[Problem]:
    for index, text in enumerate(builds):
        try:
            Build.parse(text)
        except ValueError:
            yield Problem(f"{path}[{index}]", f"must be a distribution's exact release: got {shown(text)}; {_BUILD}")
    yield from _unique(path, builds)
    if list(builds) != sorted(builds):
        yield Problem(path, f"must be sorted: got {', '.join(builds)}")


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


@cache
def accepted_engines(site: SiteName, model: ModelConfig) -> tuple[Engine, ...]:
    """Engines that may have tables of their own for ``site`` and ``model``."""
    return tuple(engine for engine in Engine if table_engine(engine, site, model) is engine)


@cache
def accepted_heads(site: SiteName, model: ModelConfig, engine: Engine = Engine.SGLANG) -> tuple[int | None, ...]:
    """Head counts that tables of ``site`` and ``model`` may have; the one None where heads play no role."""
    return (None,) if site is SiteName.INDEXER_METADATA else engine_heads(engine, model)


def accepted_candidates(site: SiteName, model: ModelConfig, engine: Engine) -> tuple[str, ...]:
    """Candidates that ``engine`` can take somewhere in ``model``, sorted."""
    names = {name for layer in model.site_layers(site) for name in engine_choice(engine, site, layer).candidates}
    return tuple(sorted(names))


def _measured(path: str, measured: Range) -> Iterator[Problem]:
    ranges = {
        "num_qo_tokens": measured.num_qo_tokens,
        "kv_tokens": measured.kv_tokens,
        "num_reqs": measured.num_reqs,
    }
    for name, (low, high) in ranges.items():
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
    groups = [(start, list(members)) for start, members in groupby(enumerate(rows), lambda row: row[1].num_reqs_from)]
    yield from _ascending(path, "num_reqs_from", [(members[0][0], start) for start, members in groups])
    for _, members in groups:
        yield from _ascending(path, "kv_tokens_from", [(index, row.kv_tokens_from) for index, row in members])
    for index, row in enumerate(rows):
        yield from _choices(f"{path}[{index}].choices", row, candidates)
        if row.censored is not None:
            yield from _one_of(f"{path}[{index}].censored", row.censored, CENSORED)
            if len(row.choices) > 1:
                rule = "must be absent where the row has a crossover"
                yield Problem(
                    f"{path}[{index}].censored", f"{rule}: got {row.censored} with {len(row.choices)} choices"
                )


def _crossing(path: str, table: Table) -> Iterator[Problem]:
    """Thresholds of a row that pass each other before the row ends."""
    for index, row in enumerate(table.rows):
        following = table.rows[index + 1] if index + 1 < len(table.rows) else None
        same_group = following is not None and following.num_reqs_from == row.num_reqs_from
        end = following.kv_tokens_from if following and same_group else table.measured.kv_tokens[1] + 1
        lines = [
            Threshold.through(
                (row.kv_tokens_from, end), (c.num_qo_tokens_from, c.num_qo_tokens_to or c.num_qo_tokens_from)
            )
            for c in row.choices
        ]
        for place, (before, line) in enumerate(pairwise(lines), 1):
            if line.is_below(before, end):
                rule = "must stay above the threshold before it to the row's end, rounded as it is served"
                yield Problem(f"{path}[{index}].choices[{place}].num_qo_tokens_to", f"{rule}: got {line.at(end)}")


def _choices(path: str, row: Row, candidates: Collection[str]) -> Iterator[Problem]:
    choices = row.choices
    if not choices:
        yield Problem(path, "must hold at least one choice: got none")
    yield from _ascending(path, "num_qo_tokens_from", [(i, c.num_qo_tokens_from) for i, c in enumerate(choices)])
    for index, choice in enumerate(choices):
        if choice.num_qo_tokens_to is not None and choice.num_qo_tokens_to <= choice.num_qo_tokens_from:
            rule = f"must be above num_qo_tokens_from={choice.num_qo_tokens_from}, or absent"
            yield Problem(f"{path}[{index}].num_qo_tokens_to", f"{rule}: got {choice.num_qo_tokens_to}")
    ends = [c.num_qo_tokens_from if c.num_qo_tokens_to is None else c.num_qo_tokens_to for c in choices]
    yield from _ascending(path, "num_qo_tokens_to", list(enumerate(ends)))
    for index, choice in enumerate(choices):
        if choice.candidate not in candidates:
            yield from _one_of(f"{path}[{index}].candidate", choice.candidate, candidates)
        if index and choice.candidate == choices[index - 1].candidate:
            rule = "must differ from the choice before it"
            yield Problem(f"{path}[{index}].candidate", f"{rule}: got {choice.candidate} twice")
        if not (choice.bracket is choice.interval is choice.win is None):
            yield from _evidence(f"{path}[{index}]", choice, first=not index)


def _evidence(path: str, choice: Choice, *, first: bool) -> Iterator[Problem]:
    """What a choice says of its own threshold."""
    factors = (("bracket", choice.bracket), ("interval", choice.interval))
    if first:
        for name, pair in (*factors, ("win", choice.win)):
            if pair is not None:
                yield Problem(f"{path}.{name}", f"must be absent on the first choice of a row: got {list(pair)}")
    for name, pair in factors:
        if pair is not None and not 0 <= pair[0] <= 1 <= pair[1] < math.inf:
            rule = "must be factors [low, high] around the threshold, with 0 <= low <= 1 <= high"
            yield Problem(f"{path}.{name}", f"{rule}: got {list(pair)}")
    win = choice.win
    if win is not None and not (-1 < win[0] < math.inf and -1 < win[1] < math.inf):
        yield Problem(f"{path}.win", f"must be two relative differences above -1: got {list(win)}")


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


def _ascending(path: str, name: str, starts: list[tuple[int, int]]) -> Iterator[Problem]:
    """``starts`` are (index, value) of the entries below ``path``."""
    if starts and starts[0][1] != 0:
        yield Problem(f"{path}[{starts[0][0]}].{name}", f"must be 0 on the first entry: got {starts[0][1]}")
    for (_, before), (index, start) in pairwise(starts):
        if not before < start <= MAX_INT64:
            yield Problem(f"{path}[{index}].{name}", f"must be above the entry before it ({before}): got {start}")
