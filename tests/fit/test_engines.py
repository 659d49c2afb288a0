"""Tables of engines that launch or choose otherwise than SGLang: their own candidates, their own incumbent, one sweep."""

from __future__ import annotations

import math
import re

import pytest

from mla_tune.fit.costs import CostModel
from mla_tune.fit.refine import crossover_shapes
from mla_tune.fit.table_rows import fit_policy, left_out
from mla_tune.policy.codec import dump_policy, parse_policy
from mla_tune.policy.decision import Decision
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.candidates import WITH_KVCACHE_MIXED
from mla_tune.sites.engines import Engine, engine_choice
from mla_tune.sites.shape import Shape, workload
from mla_tune.sites.site import LayerType, Site, SiteName
from mla_tune.store.measurement import Measurement
from tests.fit.synthetic import ENVIRONMENT, SOURCE, V3_2, World, stage_us, sweep

DSA = V3_2.site(SiteName.PREFILL_ATTENTION, LayerType.DSA, 64)


def law(site: Site, candidate: str, stage: str, shape: Shape) -> float:
    """The mixed launch plans at once and splits nothing: no slow start with many queries, whole waves with few."""
    if candidate != WITH_KVCACHE_MIXED.name:
        return stage_us(site, candidate, stage, shape)
    if stage == "schedule":
        return 9.0
    load = workload(site, shape)
    waves = math.ceil(shape.num_qo_tokens * (site.h_q or 64) / 64 / ENVIRONMENT.sm_count)
    return 14 + waves * math.ceil(load.attended / 64) * 2.6


MEASURED = sweep(World(law=law, noise=0.003, not_measured=()), [DSA], held_out=12, model=V3_2)


def fit(measurements: list[Measurement]) -> Policy:
    return fit_policy(ENVIRONMENT, measurements, source=SOURCE).policy


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    """The tables of one layer type by engine."""
    return {table.engine: table for table in fit(MEASURED).tables if table.layer == "dsa"}


def test_every_engine_has_a_table_of_its_own_candidates_and_incumbent(tables: dict[str, Table]) -> None:
    assert list(tables) == list(Engine)
    for engine in Engine:
        choice = engine_choice(engine, SiteName.PREFILL_ATTENTION, LayerType.DSA)
        assert (tables[engine].incumbent, tables[engine].candidates) == (choice.incumbent, choice.candidates)


def test_vllms_tables_find_where_its_own_two_launches_cross(tables: dict[str, Table]) -> None:
    for engine in (Engine.VLLM, Engine.VLLM_FEW_HEADS):
        assert Decision(tables[engine]).choose(64, 4 << 20, 64) == WITH_KVCACHE_MIXED.name
        assert Decision(tables[engine]).choose(16384, 131072, 1) == "sparse_fwd"


def test_vllms_tables_lose_little_on_held_out_points() -> None:
    judged = fit_policy(ENVIRONMENT, MEASURED, source=SOURCE).evidence.tables
    theirs = [entry for entry in judged if entry.engine in (Engine.VLLM, Engine.VLLM_FEW_HEADS)]
    assert theirs
    assert all(entry.held_out.slowdown[0].worst < 1.25 for entry in theirs)


def test_engines_tables_are_written_and_read_back(tables: dict[str, Table]) -> None:
    policy = fit(MEASURED)
    assert parse_policy(dump_policy(policy), "memory") == policy
    text = dump_policy(policy).decode()
    assert [len(re.findall(rf"\bengine: {engine}\b[,}}\n]", text)) for engine in Engine] == [
        0,
        1,
        1,
        1,
    ]  # V3.2's forward is its only layer type


def test_a_sweep_from_before_other_candidates_were_known_gives_the_same_tables_as_ever() -> None:
    old = [m for m in MEASURED if m.candidate in ("sparse_fwd", "with_kvcache")]
    policy = fit(old)
    assert {table.engine for table in policy.tables} == {Engine.SGLANG}
    assert policy.tables == tuple(table for table in fit(MEASURED).tables if table.engine == Engine.SGLANG)
    assert left_out(old, policy) == []


def test_each_engines_own_crossovers_are_measured_next() -> None:
    launched = [m for m in MEASURED if not m.candidate.startswith("sparse_fwd_")]
    found = {shape for _, shape in crossover_shapes(CostModel(ENVIRONMENT, launched), [V3_2])}
    for hidden in (WITH_KVCACHE_MIXED.name, "with_kvcache"):
        kept = [m for m in launched if m.candidate != hidden]
        alone = {shape for _, shape in crossover_shapes(CostModel(ENVIRONMENT, kept), [V3_2])}
        assert alone
        assert alone <= found
