"""Hypothesis strategies for valid policies, and one realistic policy to break."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from mla_tune.policy.evidence import (
    HeldOut,
    LimitEvidence,
    Modelled,
    PolicyEvidence,
    RowEvidence,
    Slowdown,
    StageUncertainty,
    TableEvidence,
    ThresholdEvidence,
)
from mla_tune.policy.rules import accepted_candidates, accepted_engines, accepted_heads, problems
from mla_tune.policy.schema import (
    CandidateBuilds,
    Choice,
    Gpu,
    Ineligible,
    Library,
    Limit,
    Policy,
    PolicyEnvironment,
    Range,
    Row,
    Source,
    Table,
)
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.engines import Engine
from mla_tune.sites.site import FORWARD, MODELS, SiteName

KEYS = [
    (site, model.name, h_q, layer, engine)
    for site in SiteName
    for model in MODELS.values()
    for engine in accepted_engines(site, model)
    for h_q in accepted_heads(site, model, engine)
    for layer in (*model.site_layers(site), FORWARD)
]
"""Every (site, model, h_q, layer, engine) that a policy may have a table for."""

MAX = 2**63 - 1
counts = st.one_of(st.integers(1, 40_000), st.integers(1, MAX - 1))
words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=20)
names = words | st.sampled_from(
    ["yes", "1e3", "0x1F", "1.0.0", "null", "12:30:45", "2024-01-01", "~", "a: b", "[x]", "#"]
)
slowdowns = st.floats(1, 1e9, allow_nan=False)


def table(**changes: Any) -> Table:
    """A table with one crossover at 4096 query tokens, changed as asked."""
    base = Table(
        site="prefill_attention",
        model="deepseek-v4-flash",
        h_q=64,
        layer="c4a",
        incumbent="sparse_fwd",
        candidates=("sparse_fwd", "with_kvcache"),
        builds=("sgl-flash-mla==1.0.0",),
        measured=Range(num_qo_tokens=(16, 32768), kv_tokens=(2048, 1 << 26), num_reqs=(1, 64)),
        rows=(
            Row(
                choices=(
                    Choice(candidate="with_kvcache"),
                    Choice(threshold=Threshold.level(4096), candidate="sparse_fwd"),
                ),
            ),
            Row(
                kv_tokens_from=1 << 20,
                choices=(
                    Choice(candidate="with_kvcache"),
                    Choice(threshold=Threshold((6000, 12000), (1 << 20, 1 << 26)), candidate="sparse_fwd"),
                ),
            ),
            Row(num_reqs_from=16, choices=(Choice(candidate="with_kvcache"),)),
        ),
    )
    return msgspec.structs.replace(base, **changes)


def policy(*tables: Table, **changes: Any) -> Policy:
    """A policy of one H200 with ``tables`` (by default one), changed as asked."""
    base = Policy(
        gpu=Gpu(sku="nvidia-h200", sm_count=132),
        evidence="measured",
        regime="graph",
        environment=PolicyEnvironment(
            driver="580.1",
            cuda="13.0",
            torch="2.11.0+cu130",
            triton="3.6.0",
            shared_memory_optin_bytes=232448,
            libraries=(Library(name="sgl-flash-mla", version="1.0.0", sha256="0" * 64),),
        ),
        source=Source(
            file="db/nvidia-h200.jsonl", sha256="1" * 64, measurements=1234, command="mla-tune fit --gpu h200"
        ),
        tables=tables or (table(),),
    )
    return msgspec.structs.replace(base, **changes)


def evidence(*of: Table, **changes: Any) -> PolicyEvidence:
    """Evidence of ``of``, by default of the table of :func:`policy`, changed as asked."""
    base = PolicyEvidence(first_call_bound_s=1.0, tables=tuple(map(table_evidence, of or (table(),))))
    return msgspec.structs.replace(base, **changes)


def table_evidence(of: Table) -> TableEvidence:
    """Evidence of one table."""
    return TableEvidence(
        site=of.site,
        model=of.model,
        h_q=of.h_q,
        layer=of.layer,
        engine=of.engine,
        noise_band=0.03,
        rows=tuple(
            RowEvidence(
                num_reqs_from=row.num_reqs_from,
                kv_tokens_from=row.kv_tokens_from,
                censored="above" if len(row.choices) == 1 else None,
                thresholds=tuple(ThresholdEvidence(bracket=(0.9, 1.25), win=(0.02, 0.03)) for _ in row.choices[1:]),
            )
            for row in of.rows
        ),
        limits=tuple(
            LimitEvidence(
                candidate=limit.candidate,
                num_qo_tokens=limit.num_qo_tokens,
                fails_at=limit.num_qo_tokens + 1,
                found_by="probe",
                reason="out of bounds",
            )
            for limit in of.limits
        ),
        held_out=HeldOut(
            points=40,
            slowdown=(
                Slowdown(rule="policy", geomean=1.01, mean=1.012, p95=1.05, worst=1.2),
                Slowdown(rule="num_qo_tokens > 11673", geomean=1.2, mean=1.3, p95=2.0, worst=4.5),
            ),
        ),
    )


MODELLED = Modelled(
    limits="carried over",
    stages=(
        StageUncertainty(
            site="prefill_attention/c4a/h64/k512", candidate="sparse_fwd", stage="attention", measured=0.02, scaled=0.25
        ),
    ),
)


def modelled_policy(*tables: Table, **changes: Any) -> Policy:
    """A policy of one B200, scaled from the H200, changed as asked."""
    target = Gpu(sku="nvidia-b200", sm_count=148)
    return policy(
        *(tables or (table(),)), **{"gpu": target, "evidence": "modelled", "scaled_from": "nvidia-h200", **changes}
    )


def anywhere(policy: Policy) -> Policy:
    """``policy`` as if every kernel were this project's own: its tables depend on no build."""
    tables = (msgspec.structs.replace(of, builds=(), candidate_builds=()) for of in policy.tables)
    return msgspec.structs.replace(policy, tables=tuple(tables))


def full_policy() -> Policy:
    """A table for every site, model, head count and layer, a dozen rows each: what one GPU's file holds."""
    row = table().rows[1]
    rows = tuple(
        Row(num_reqs_from=reqs, kv_tokens_from=start * 100_000, choices=row.choices)
        for reqs in (0, 3, 12)
        for start in range(4)
    )
    mixed_rows = tuple(
        msgspec.structs.replace(
            row, choices=(msgspec.structs.replace(row.choices[0], candidate="with_kvcache_mixed"), *row.choices[1:])
        )
        for row in rows
    )
    indexer_rows = (Row(choices=(Choice(candidate="jit"),)),)
    tables = []
    for site, model, h_q, layer, engine in KEYS:
        changes: dict[str, Any] = {"site": site.value, "model": model, "h_q": h_q, "layer": str(layer), "rows": rows}
        if engine is Engine.OWN:
            changes["engine"] = engine
        elif engine is not Engine.SGLANG:
            changes |= {"engine": engine, "candidates": ("sparse_fwd", "with_kvcache_mixed"), "rows": mixed_rows}
        if site is SiteName.INDEXER_METADATA:
            own = (CandidateBuilds(candidate="deep_gemm", builds=("sgl-deep-gemm==0.1.2",)),)
            changes |= {"incumbent": "jit", "candidates": ("deep_gemm", "jit"), "rows": indexer_rows}
            changes |= {"builds": (), "candidate_builds": own}
        tables.append(table(**changes))
    return policy(*tables)


@st.composite
def rows(draw: st.DrawFn, candidates: tuple[str, ...]) -> tuple[Row, ...]:
    found = []
    for reqs in [0, *sorted(draw(st.sets(counts, max_size=2)))]:
        for start in [0, *sorted(draw(st.sets(counts, max_size=2)))]:
            chosen = draw(choices(candidates))
            found.append(Row(num_reqs_from=reqs, kv_tokens_from=start, choices=chosen))
    return tuple(found)


@st.composite
def choices(draw: st.DrawFn, candidates: tuple[str, ...]) -> tuple[Choice, ...]:
    starts = [0, *sorted(draw(st.sets(counts, max_size=3 if len(candidates) > 1 else 0)))]
    size = len(starts) - 1
    ends = [0, *sorted(draw(st.sets(counts, min_size=size, max_size=size)))] if draw(st.booleans()) else starts
    contexts = sorted(draw(st.tuples(counts, counts)))
    found: list[Choice] = []
    for start, end in zip(starts, ends, strict=True):
        others = [name for name in candidates if not found or name != found[-1].candidate]
        line = Threshold.through((contexts[0], contexts[1]), (start, end))
        found.append(Choice(threshold=line, candidate=draw(st.sampled_from(others))))
    return tuple(found)


@st.composite
def limits(draw: st.DrawFn, candidates: tuple[str, ...]) -> tuple[Limit, ...]:
    limited = draw(st.lists(st.sampled_from(candidates), unique=True, max_size=2))
    most = st.integers(0, MAX - 1) | st.integers(0, 40_000)
    return tuple(Limit(candidate=candidate, num_qo_tokens=draw(most)) for candidate in limited)


@st.composite
def ineligible(draw: st.DrawFn, candidates: list[str]) -> tuple[Ineligible, ...]:
    barred = draw(st.lists(st.sampled_from(candidates), unique=True)) if candidates else []
    seconds = st.integers(0, 100).map(lambda halves: halves / 2)
    return tuple(Ineligible(candidate=name, first_call_s=draw(seconds)) for name in barred)


BUILDS = ("sgl-flash-mla==1.0.0", "sglang==0.5.23", "vllm==0.33.0+cu130", "flash-mla==unknown", "a-b-c==1!2.0rc1.post2")


@st.composite
def candidate_builds(draw: st.DrawFn, others: list[str]) -> tuple[CandidateBuilds, ...]:
    named = draw(st.lists(st.sampled_from(others), unique=True)) if others else []
    builds = st.sets(st.sampled_from(["sgl-deep-gemm==0.1.2", "sglang-kernel==0.4.10"]), min_size=1)
    return tuple(CandidateBuilds(candidate=name, builds=tuple(sorted(draw(builds)))) for name in named)


def without_crossing(**fields: Any) -> Table:
    """A table, with level thresholds where slanted ones pass each other, and one choice a row where these would too."""
    found = Table(**fields)
    for shape in (_levelled, _single):
        if not list(problems(policy(found))):
            break
        found = msgspec.structs.replace(found, rows=tuple(map(shape, found.rows)))
    return found


def _levelled(row: Row) -> Row:
    choices = (
        msgspec.structs.replace(choice, threshold=Threshold.level(choice.threshold.num_qo_tokens[0]))
        for choice in row.choices
    )
    return msgspec.structs.replace(row, choices=tuple(choices))


def _single(row: Row) -> Row:
    return msgspec.structs.replace(row, choices=row.choices[:1])


@st.composite
def tables(draw: st.DrawFn, key: tuple[SiteName, str, int | None, str, Engine] = KEYS[0]) -> Table:
    site, model, h_q, layer, engine = key
    known = accepted_candidates(site, MODELS[model], engine)
    candidates = tuple(sorted(draw(st.sets(st.sampled_from(known), min_size=1))))
    ranges = st.tuples(counts, counts).map(lambda pair: (min(pair), max(pair)))
    incumbent = draw(st.sampled_from(candidates))
    barred = draw(ineligible([name for name in candidates if name != incumbent]))
    served = tuple(name for name in candidates if name not in {entry.candidate for entry in barred})
    return without_crossing(
        site=site.value,
        model=model,
        h_q=h_q,
        layer=str(layer),
        engine=engine,
        incumbent=incumbent,
        candidates=candidates,
        builds=tuple(sorted(draw(st.sets(st.sampled_from(BUILDS), max_size=2)))),
        candidate_builds=draw(candidate_builds([name for name in candidates if name != incumbent])),
        measured=Range(num_qo_tokens=draw(ranges), kv_tokens=draw(ranges), num_reqs=draw(ranges)),
        limits=draw(limits(candidates)),
        ineligible=barred,
        rows=draw(rows(served)),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    keys = sorted(draw(st.lists(st.sampled_from(KEYS), unique=True, min_size=1, max_size=3)), key=KEYS.index)
    modelled = draw(st.booleans())
    libraries = draw(st.lists(st.builds(Library, name=names, version=names, sha256=names), max_size=2))
    environment = st.builds(
        PolicyEnvironment,
        driver=names,
        cuda=names | st.just(""),
        torch=names,
        triton=names,
        shared_memory_optin_bytes=st.integers(0, MAX),
        libraries=st.just(tuple({library.name: library for library in libraries}.values())),
    )
    first = draw(tables(keys[0]))
    alike = draw(st.booleans())  # in all but the key, as far as the keys allow
    found = [first, *(_like(first, key) if alike else draw(tables(key)) for key in keys[1:])]
    return Policy(
        gpu=Gpu(sku=draw(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)), sm_count=draw(counts)),
        evidence="modelled" if modelled else "measured",
        scaled_from=draw(names) if modelled else None,
        regime=draw(st.sampled_from(["graph", "eager"])),
        environment=draw(environment),
        source=draw(st.builds(Source, file=names, sha256=names, measurements=counts, command=names)),
        tables=tuple(found),
    )


def _like(first: Table, key: tuple[SiteName, str, int | None, str, Engine]) -> Table:
    """``first`` under another key; under the site and engine of its own where its candidates are not known there."""
    site, model, h_q, layer, engine = key
    if not set(first.candidates) <= set(accepted_candidates(site, MODELS[model], engine)):
        incumbent = accepted_candidates(site, MODELS[model], engine)[0]
        rows_ = (Row(choices=(Choice(candidate=incumbent),)),)
        first = msgspec.structs.replace(
            first,
            incumbent=incumbent,
            candidates=(incumbent,),
            candidate_builds=(),
            limits=(),
            ineligible=(),
            rows=rows_,
        )
    return msgspec.structs.replace(first, site=site.value, model=model, h_q=h_q, layer=str(layer), engine=engine)
