"""Hypothesis strategies for valid policies, and one realistic policy to break."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from mla_tune.policy.evidence import (
    Modelled,
    ScaledFrom,
    StageUncertainty,
    TrafficWeights,
    Uncertainty,
    WorkspaceCap,
)
from mla_tune.policy.rules import accepted_candidates, accepted_engines, accepted_heads, problems
from mla_tune.policy.schema import (
    CandidateBuilds,
    Choice,
    Gpu,
    HeldOut,
    Ineligible,
    Library,
    Limit,
    Policy,
    PolicyEnvironment,
    Range,
    Row,
    Slowdown,
    Source,
    Table,
)
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
        noise_band=0.03,
        measured=Range(num_qo_tokens=(16, 32768), kv_tokens=(2048, 1 << 26), num_reqs=(1, 64)),
        limits=(),
        ineligible=(),
        rows=(
            Row(
                num_reqs_from=0,
                kv_tokens_from=0,
                choices=(
                    Choice(num_qo_tokens_from=0, candidate="with_kvcache"),
                    Choice(num_qo_tokens_from=4096, candidate="sparse_fwd", bracket=(0.95, 1.05)),
                ),
            ),
            Row(
                num_reqs_from=0,
                kv_tokens_from=1 << 20,
                choices=(
                    Choice(num_qo_tokens_from=0, candidate="with_kvcache"),
                    Choice(
                        num_qo_tokens_from=6000,
                        num_qo_tokens_to=12000,
                        candidate="sparse_fwd",
                        bracket=(0.9, 1.25),
                        interval=(0.98, 1.1),
                        win=(0.02, 0.03),
                    ),
                ),
            ),
            Row(
                num_reqs_from=16,
                kv_tokens_from=0,
                censored="above",
                choices=(Choice(num_qo_tokens_from=0, candidate="with_kvcache"),),
            ),
        ),
        held_out=HeldOut(
            points=40,
            slowdown=(
                Slowdown(rule="policy", geomean=1.01, mean=1.012, p95=1.05, worst=1.2),
                Slowdown(rule="num_qo_tokens > 11673", geomean=1.2, mean=1.3, p95=2.0, worst=4.5),
            ),
        ),
    )
    return msgspec.structs.replace(base, **changes)


def policy(*tables: Table, **changes: Any) -> Policy:
    """A policy of one H200 with ``tables`` (by default one), changed as asked."""
    base = Policy(
        schema=3,
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


MODELLED = Modelled(
    scaled_from=ScaledFrom(sku="nvidia-h200", sm_count=132),
    limits="carried over",
    stages=(
        StageUncertainty(
            site="prefill_attention/c4a/h64/k512", candidate="sparse_fwd", stage="attention", measured=0.02, scaled=0.25
        ),
    ),
)


def modelled_policy(*tables: Table, **changes: Any) -> Policy:
    """A policy of one B200, scaled from the H200, changed as asked."""
    stated = (Uncertainty(candidate="sparse_fwd", relative=0.27), Uncertainty(candidate="with_kvcache", relative=0.5))
    unjudged = HeldOut(points=0, slowdown=())
    given = tables or (table(uncertainty=stated, noise_band=1.2, held_out=unjudged),)
    target = Gpu(sku="nvidia-b200", sm_count=148)
    return policy(*given, **{"gpu": target, "evidence": "modelled", "modelled": MODELLED, **changes})


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
    indexer_rows = (Row(num_reqs_from=0, kv_tokens_from=0, choices=(Choice(num_qo_tokens_from=0, candidate="jit"),)),)
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
            censored = draw(st.sampled_from([None, "above", "below"])) if len(chosen) == 1 else None
            found.append(Row(num_reqs_from=reqs, kv_tokens_from=start, censored=censored, choices=chosen))
    return tuple(found)


factors = st.tuples(st.floats(0, 1), st.floats(1, 1e6))
wins = st.tuples(st.floats(-0.5, 1e6), st.floats(-0.5, 1e6))


@st.composite
def choices(draw: st.DrawFn, candidates: tuple[str, ...]) -> tuple[Choice, ...]:
    starts = [0, *sorted(draw(st.sets(counts, max_size=3 if len(candidates) > 1 else 0)))]
    size = len(starts) - 1
    ends = [0, *sorted(draw(st.sets(counts, min_size=size, max_size=size)))] if draw(st.booleans()) else starts
    if any(end < start for start, end in zip(starts, ends, strict=True)):
        ends = starts
    found: list[Choice] = []
    for start, end in zip(starts, ends, strict=True):
        others = [name for name in candidates if not found or name != found[-1].candidate]
        evidence: dict[str, Any] = {}
        if found:
            evidence = {
                "bracket": draw(st.none() | factors),
                "interval": draw(st.none() | factors),
                "win": draw(st.none() | wins),
            }
        to = None if end == start else end
        found.append(
            Choice(num_qo_tokens_from=start, num_qo_tokens_to=to, candidate=draw(st.sampled_from(others)), **evidence)
        )
    return tuple(found)


@st.composite
def limits(draw: st.DrawFn, candidates: tuple[str, ...]) -> tuple[Limit, ...]:
    found = []
    for candidate in draw(st.lists(st.sampled_from(candidates), max_size=2)):
        largest = draw(st.integers(0, MAX - 1) | st.integers(0, 40_000))
        fails_at = draw(st.integers(largest + 1, MAX))
        reason = draw(names)
        found.append(
            Limit(candidate=candidate, num_qo_tokens=largest, fails_at=fails_at, found_by="sweep", reason=reason)
        )
    return tuple(found)


@st.composite
def ineligible(draw: st.DrawFn, candidates: list[str]) -> tuple[Ineligible, ...]:
    barred = draw(st.lists(st.sampled_from(candidates), unique=True)) if candidates else []
    return tuple(
        Ineligible(candidate=name, first_call_s=bound + 0.5, bound_s=bound)
        for name in barred
        for bound in [draw(st.integers(0, 100).map(lambda halves: halves / 2))]
    )


BUILDS = ("sgl-flash-mla==1.0.0", "sglang==0.5.23", "vllm==0.33.0+cu130", "flash-mla==unknown", "a-b-c==1!2.0rc1.post2")


@st.composite
def candidate_builds(draw: st.DrawFn, others: list[str]) -> tuple[CandidateBuilds, ...]:
    named = draw(st.lists(st.sampled_from(others), unique=True)) if others else []
    builds = st.sets(st.sampled_from(["sgl-deep-gemm==0.1.2", "sglang-kernel==0.4.10"]), min_size=1)
    return tuple(CandidateBuilds(candidate=name, builds=tuple(sorted(draw(builds)))) for name in named)


def without_crossing(*, modelled: bool, **fields: Any) -> Table:
    """A table, with level thresholds where rounding would let slanted ones pass each other."""
    found = Table(**fields)
    if not list(problems(modelled_policy(found) if modelled else policy(found))):
        return found
    rows = [
        msgspec.structs.replace(
            row, choices=tuple(msgspec.structs.replace(choice, num_qo_tokens_to=None) for choice in row.choices)
        )
        for row in found.rows
    ]
    return msgspec.structs.replace(found, rows=tuple(rows))


relative_errors = st.floats(0, 1e9, allow_nan=False)


@st.composite
def stated(draw: st.DrawFn) -> Modelled:
    stage = st.builds(
        StageUncertainty, site=names, candidate=names, stage=names, measured=relative_errors, scaled=relative_errors
    )
    return Modelled(
        scaled_from=ScaledFrom(sku=draw(names), sm_count=draw(counts)),
        limits=draw(words),
        stages=tuple(draw(st.lists(stage, max_size=2))),
    )


hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
weights = st.builds(
    TrafficWeights,
    traffic=hashes,
    forwards=counts,
    uniform_share=st.floats(0, 1, exclude_min=True, allow_subnormal=False),
)
caps = st.tuples(st.integers(0, MAX), st.integers(0, MAX), st.integers(0, MAX)).flatmap(
    lambda found: st.builds(
        WorkspaceCap,
        max_bytes=counts,
        shapes=st.just(max(found)),
        over=st.just(sorted(found)[1]),
        exempt=st.just(min(found)),
    )
)


@st.composite
def tables(
    draw: st.DrawFn, key: tuple[SiteName, str, int | None, str, Engine] = KEYS[0], *, modelled: bool = False
) -> Table:
    site, model, h_q, layer, engine = key
    known = accepted_candidates(site, MODELS[model], engine)
    candidates = tuple(sorted(draw(st.sets(st.sampled_from(known), min_size=1))))
    ranges = st.tuples(counts, counts).map(lambda pair: (min(pair), max(pair)))
    incumbent = draw(st.sampled_from(candidates))
    barred = draw(ineligible([name for name in candidates if name != incumbent]))
    served = tuple(name for name in candidates if name not in {entry.candidate for entry in barred})
    rules = ["policy", *draw(st.lists(words.filter(lambda word: word != "policy"), unique=True, max_size=2))]
    uncertain = draw(st.lists(st.sampled_from(candidates), unique=True)) if modelled else []
    return without_crossing(
        modelled=modelled,
        site=site.value,
        model=model,
        h_q=h_q,
        layer=str(layer),
        engine=engine,
        incumbent=incumbent,
        candidates=candidates,
        builds=tuple(sorted(draw(st.sets(st.sampled_from(BUILDS), max_size=2)))),
        candidate_builds=draw(candidate_builds([name for name in candidates if name != incumbent])),
        noise_band=draw(relative_errors if modelled else st.floats(0, 1, exclude_max=True)),
        uncertainty=tuple(Uncertainty(candidate=name, relative=draw(relative_errors)) for name in uncertain),
        workspace_cap=draw(st.none() | caps),
        measured=Range(num_qo_tokens=draw(ranges), kv_tokens=draw(ranges), num_reqs=draw(ranges)),
        limits=draw(limits(candidates)),
        ineligible=barred,
        rows=draw(rows(served)),
        held_out=HeldOut(
            points=draw(counts),
            slowdown=tuple(
                Slowdown(
                    rule=rule, geomean=draw(slowdowns), mean=draw(slowdowns), p95=draw(slowdowns), worst=draw(slowdowns)
                )
                for rule in rules
            ),
        ),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    keys = draw(st.lists(st.sampled_from(KEYS), unique=True, min_size=1, max_size=2))
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
    return Policy(
        schema=3,
        gpu=Gpu(sku=draw(st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)), sm_count=draw(counts)),
        evidence="modelled" if modelled else "measured",
        modelled=draw(stated()) if modelled else None,
        objective=draw(st.none() | weights),
        regime=draw(st.sampled_from(["graph", "eager"])),
        environment=draw(environment),
        source=draw(st.builds(Source, file=names, sha256=names, measurements=counts, command=names)),
        tables=tuple(draw(tables(key, modelled=modelled)) for key in keys),
    )
