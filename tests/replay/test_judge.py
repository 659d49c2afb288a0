"""Rules on replayed forwards, by the committed H200 measurements."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import PolicyError, UsageError
from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import rules
from mla_tune.fit.scope import scope
from mla_tune.fit.work import work
from mla_tune.policy.schema import Limit
from mla_tune.replay.prices import IncumbentClock, Pricer
from mla_tune.replay.rule_comparison import LAYERED_RULE, ORACLE, judge
from mla_tune.sites.shape import AnyShape, RaggedShape
from mla_tune.sites.site import FORWARD, SiteName
from tests.replay.conftest import EVERY, export, pricer
from tests.shapes import one_by_one, ragged_shapes, shapes

forwards = st.dictionaries(ragged_shapes(8, 3000, 60_000), st.integers(1, 5), min_size=1, max_size=12)
ROUNDING = 1 + 1e-9


@settings(max_examples=25)
@given(st.sampled_from(EVERY), forwards)
def test_no_rule_beats_the_fastest_candidates_and_the_policy_is_one_of_the_rules(
    model: tuple[str, int], occurred: dict[AnyShape, int]
) -> None:
    judged = judge(pricer(*model), occurred)
    oracle_us = judged.rule(ORACLE).total_us
    assert oracle_us is not None
    for entry in judged.rules:
        if entry.rule != LAYERED_RULE:  # it may mix candidates within a forward
            assert entry.total_us is not None
            assert entry.total_us * ROUNDING >= oracle_us
    assert judged.forwards == sum(occurred.values())
    assert judged.distinct == len(occurred)
    assert judged.incumbent.differs == 0.0
    assert judged.incumbent.rule == f"always {pricer(*model).tables.attention.incumbent}"
    assert judged.rules[0].rule == "policy"


@settings(max_examples=15)
@given(st.sampled_from(EVERY), forwards)
def test_a_rule_costs_what_its_choices_cost_one_by_one(model: tuple[str, int], occurred: dict[AnyShape, int]) -> None:
    prices, tables = pricer(*model), pricer(*model).tables
    judged = judge(prices, occurred)
    where = scope(SiteName.PREFILL_ATTENTION, prices.model, FORWARD, tables.attention.h_q)
    for name, rule in rules(tables.attention):
        per_forward_us, differs = [], 0
        for shape, count in occurred.items():
            picked = rule(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)
            us = float(where.predicted_us(prices.costs, picked, [work(site, [shape]) for site, _ in where.parts])[0])
            per_forward_us += [us] * count
            differs += count * (picked != tables.attention.incumbent)
        entry = judged.rule(name)
        assert entry.attention_us == pytest.approx(sum(per_forward_us))
        assert entry.differs == pytest.approx(differs / sum(occurred.values()))
        assert entry.p50_us is not None
        assert entry.p99_us is not None
        assert np.median(per_forward_us) <= entry.p50_us * ROUNDING  # the indexer's time comes on top
        assert entry.p50_us <= entry.p99_us * ROUNDING


@settings(max_examples=15)
@given(forwards)
def test_a_forward_that_occurs_twice_counts_twice_in_whatever_order(occurred: dict[AnyShape, int]) -> None:
    once, doubled = judge(pricer(), occurred), judge(pricer(), {shape: 2 * n for shape, n in occurred.items()})
    backwards = judge(pricer(), dict(reversed(occurred.items())))
    for one, two, back in zip(once.rules, doubled.rules, backwards.rules, strict=True):
        assert two.total_us == pytest.approx(2 * (one.total_us or 0))
        assert back.total_us == pytest.approx(one.total_us)
        assert two.differs == pytest.approx(one.differs) == back.differs


@settings(max_examples=10)
@given(st.lists(shapes(8, 2000, 20_000), min_size=1, max_size=6, unique=True))
def test_requests_listed_one_by_one_cost_what_an_equal_split_costs(some: list[AnyShape]) -> None:
    listed = pricer().prices([one_by_one(shape) for shape in some])  # type: ignore[arg-type]
    even = pricer().prices(some)
    for name in pricer().tables.attention.candidates:
        assert (listed.attention_of(name) == even.attention_of(name)).all()
    assert (listed.metadata.total_us == even.metadata.total_us).all()


def test_full_chunks_of_v4_gain_nothing_and_those_of_v32_a_third() -> None:
    chunks = Counter[AnyShape]({RaggedShape(((8192, 8192 * n),)): 1 for n in range(1, 9)})
    flash = judge(pricer(), chunks)
    assert flash.rule("policy").total_us == flash.incumbent.total_us
    assert flash.rule("policy").differs == 0.0
    v32 = judge(pricer("deepseek-v3.2", 128), chunks)
    ratio = (v32.rule("policy").total_us or 0) / (v32.incumbent.total_us or 1)
    assert 0.6 < ratio < 0.75
    assert v32.rule("policy").differs == 1.0


def test_a_rule_that_passes_a_limit_has_no_time_and_says_at_how_many_forwards() -> None:
    beyond = RaggedShape(((65536, 65536),))
    judged = judge(pricer("deepseek-v4-pro", 128), {beyond: 3, RaggedShape(((100, 9000),)): 1})
    always = judged.rule("always with_kvcache")
    assert (always.total_us, always.p50_us, always.p99_us, always.failing) == (None, None, None, 3)
    assert judged.rule("policy").failing == judged.rule(ORACLE).failing == 0


def test_what_lies_outside_the_measured_ranges_is_counted() -> None:
    inside, outside = RaggedShape(((64, 4096),)), RaggedShape(((2, 3),))
    assert judge(pricer(), {inside: 3, outside: 1}).outside == 0.25


def test_no_forwards_raise() -> None:
    with pytest.raises(UsageError, match="got none"):
        judge(pricer(), {})


def test_measurements_that_lack_a_candidate_of_the_policy_are_refused() -> None:
    found = export()
    costs = CostModel(found.environment, [m for m in found.measurements if m.candidate != "with_kvcache"])
    with pytest.raises(PolicyError, match="no with_kvcache at prefill_attention"):
        Pricer(costs, pricer().tables)


def test_limits_are_those_of_each_layer_type() -> None:
    tables = pricer().tables
    limit = Limit(candidate="with_kvcache", num_qo_tokens=10)
    c4a = [msgspec.structs.replace(t, limits=(limit,)) if t.layer == "c4a" else t for t in tables.layers]
    prices = Pricer(pricer().costs, replace(tables, layers=tuple(c4a))).prices([RaggedShape(((11, 4096),))])
    infinite = {layer.layer: bool(np.isinf(layer.total_us).any()) for layer in prices.attention}
    assert infinite == {"swa_only": False, "c4a": True, "c128a": False}
    assert np.isinf(prices.attention_of("with_kvcache")).all()


@settings(max_examples=25)
@given(ragged_shapes(64, 3000, 60_000))
def test_the_clock_is_near_the_engines_own_time_and_the_same_for_like_forwards(shape: RaggedShape) -> None:
    clock = IncumbentClock(pricer())
    exact_us = pricer().incumbent_us(shape)
    assert clock(shape) == clock(RaggedShape(shape.requests)) == pytest.approx(exact_us, rel=0.5)
