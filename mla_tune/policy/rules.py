"""What a policy must satisfy beyond its types. Each broken rule is a :class:`Problem`; a valid policy has none."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from itertools import groupby, pairwise

import msgspec

from mla_tune.hardware.builds import Build
from mla_tune.policy.kernel_config import kernel_config_fault
from mla_tune.policy.schema import Ineligible, Limit, Policy, Range, Row, Table, row_ends
from mla_tune.sites.engines import Engine, engine_choice, engine_heads, table_engine
from mla_tune.sites.provider import is_provider_key
from mla_tune.sites.site import FORWARD, MODELS, OVERLAPS, ModelConfig, SiteName

EVIDENCE = ("measured", "modelled")
REGIMES = ("graph", "eager")
_BUILD = "accepted: a form like sgl-flash-mla==1.0.0"
MAX_INT64 = 2**63 - 1
REBUILD = "rebuild the file with `mla-tune fit`"
"""The next step of every error about a file's content."""


def shown(value: object) -> str:
    """``value`` as an error prints it: on one line and short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
    if (policy.scaled_from is not None) != (policy.evidence == "modelled"):
        rule = "must be there exactly where evidence is modelled"
        yield Problem("scaled_from", f"{rule}: got {shown(policy.scaled_from)} with evidence {policy.evidence}")
    if not policy.tables:
        yield Problem("tables", "must hold at least one table: got none")
    yield from _unique("tables", [table.key for table in policy.tables])
    for index, table in enumerate(policy.tables):
        yield from _table(f"tables[{index}]", table)


def _table(path: str, table: Table) -> Iterator[Problem]:
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
    yield from _measured(f"{path}.measured", table.measured)
    for index, limit in enumerate(table.limits):
        yield from _limit(f"{path}.limits[{index}]", limit, table.candidates)
    yield from _unique(f"{path}.limits", [limit.candidate for limit in table.limits])
    for index, entry in enumerate(table.ineligible):
        yield from _ineligible(f"{path}.slow_first_call_s[{index}]", entry, table)
    barred = {entry.candidate for entry in table.ineligible}
    served = [name for name in table.candidates if name not in barred]
    wrong_rows = list(_rows(f"{path}.rows", table.rows, served))
    yield from wrong_rows or _crossing(f"{path}.rows", table)


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


def _ineligible(path: str, entry: Ineligible, table: Table) -> Iterator[Problem]:
    others = [name for name in table.candidates if name != table.incumbent]
    yield from _one_of(f"{path}.candidate", entry.candidate, others)
    if not 0 <= entry.first_call_s < math.inf:
        yield Problem(path, f"must be finite seconds, at least 0: got {entry.first_call_s}")


def _rows(path: str, rows: tuple[Row, ...], candidates: Collection[str]) -> Iterator[Problem]:
    if not rows:
        yield Problem(path, "must hold at least one row: got none")
    groups = [(start, list(members)) for start, members in groupby(enumerate(rows), lambda row: row[1].num_reqs_from)]
    yield from _ascending(path, "num_reqs_from", [(members[0][0], start) for start, members in groups])
    for _, members in groups:
        yield from _ascending(path, "kv_tokens_from", [(index, row.kv_tokens_from) for index, row in members])
    for index, row in enumerate(rows):
        yield from _choices(f"{path}[{index}].choices", row, candidates)


def _crossing(path: str, table: Table) -> Iterator[Problem]:
    """Thresholds of a row that pass each other before the row ends."""
    for index, (row, end) in enumerate(zip(table.rows, row_ends(table), strict=True)):
        lines = [choice.threshold for choice in row.choices]
        for place, (before, line) in enumerate(pairwise(lines), 1):
            start = max(row.kv_tokens_from, table.measured.kv_tokens[0])
            edges = (start, max(start, end - 1))
            if not all(before.is_below(line, edge) for edge in edges):
                rule = "must start above the choice before it, all along the contexts of its row"
                yield Problem(f"{path}[{index}].choices[{place}].threshold", f"{rule}: got {line.at(end - 1)}")


def _choices(path: str, row: Row, candidates: Collection[str]) -> Iterator[Problem]:
    choices = row.choices
    if not choices:
        yield Problem(path, "must hold at least one choice: got none")
    for index, choice in enumerate(choices):
        line = choice.threshold
        if (line.num_qo_tokens == (0, 0)) is not (index == 0):
            rule = "must be 0 on the first choice of a row, which has none below it, and on no other"
            yield Problem(f"{path}[{index}].threshold", f"{rule}: got {line.num_qo_tokens[0]}")
        for low, high in (line.num_qo_tokens, line.kv_tokens):
            if not 0 <= low <= high <= MAX_INT64:
                rule = "must not fall, be at least 0 and fit in 64 bits"
                yield Problem(f"{path}[{index}].threshold", f"{rule}: got {low} to {high}")
        if choice.candidate not in candidates:
            yield from _one_of(f"{path}[{index}].candidate", choice.candidate, candidates)
        if index and choice.candidate == choices[index - 1].candidate:
            rule = "must differ from the choice before it"
            yield Problem(f"{path}[{index}].candidate", f"{rule}: got {choice.candidate} twice")


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
