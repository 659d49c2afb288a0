"""What is drawn is what is served: areas and lines against the decision itself."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.errors import PolicyError
from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import load_evidence
from mla_tune.policy.schema import Policy, Table
from mla_tune.report.boundary import areas, crossings, request_ranges
from mla_tune.report.typed_rules import typed_rules
from tests.policy.strategies import tables

POLICIES = Path(__file__).parents[2] / "policies"
NAMES = ("nvidia-h200", "nvidia-h100.sglang", "nvidia-b200")


def committed(name: str) -> Policy:
    return load_policy(POLICIES / f"{name}.yaml")


def assert_drawn_as_served(table: Table, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> None:
    """Exactly one area of the map holds the shape, and has the color of the answer."""
    answer = Decision(table).choose(num_qo_tokens, kv_tokens, num_reqs)
    assert [area.candidate for area in areas(table, num_reqs) if area.holds(num_qo_tokens, kv_tokens)] == [answer]


def can_answer(table: Table) -> bool:
    """Whether some candidate is left at every count: other tables are refused where they are read."""
    try:
        Decision(table)
    except PolicyError:
        return False
    return True


servable = tables().filter(can_answer)


@given(st.data())
def test_every_shape_in_the_measured_range_lies_in_one_area_of_the_candidate_that_is_served(
    data: st.DataObject,
) -> None:
    table = data.draw(servable)
    shape = [
        data.draw(st.integers(*ends))
        for ends in (table.measured.num_qo_tokens, table.measured.kv_tokens, table.measured.num_reqs)
    ]
    assert_drawn_as_served(table, shape[0], shape[1], shape[2])


@pytest.mark.parametrize("name", NAMES)
def test_the_areas_of_every_committed_table_agree_with_its_answers_on_a_grid(name: str) -> None:
    for table in committed(name).tables:
        low, high = table.measured.num_qo_tokens
        first, last = table.measured.kv_tokens
        queries = [count for octave in range(17) if low <= (count := 1 << octave) <= high]
        contexts = [count for octave in range(10, 27) if first <= (count := 3 << octave) <= last] or [first]
        for reqs in request_ranges(table):
            drawn, decision = areas(table, reqs[0]), Decision(table)
            for kv, qo in product(contexts, queries):
                found = [area.candidate for area in drawn if area.holds(qo, kv)]
                assert found == [decision.choose(qo, kv, reqs[0])], (table.key, qo, kv, reqs)
                assert found == [decision.choose(qo, kv, reqs[1])]


@pytest.mark.parametrize("name", NAMES)
def test_a_line_separates_the_two_answers_that_it_names(name: str) -> None:
    path = POLICIES / f"{name}.yaml"
    policy = committed(name)
    stated = load_evidence(path, digest(path.read_bytes()))
    assert stated is not None
    lines = 0
    for table in policy.tables:
        decision = Decision(table)
        limits = {limit.candidate: limit.num_qo_tokens for limit in table.limits}
        low, high = table.measured.num_qo_tokens
        for reqs in request_ranges(table):
            for line in crossings(table, stated.of(table), reqs[0]):
                lines += 1
                assert len(line.kv_tokens) == len(line.num_qo_tokens) == len(line.bracket)
                for kv, qo, (below, above) in zip(line.kv_tokens, line.num_qo_tokens, line.bracket, strict=True):
                    assert below <= qo <= above
                    if low < qo <= high and qo <= limits.get(line.after, high):
                        assert decision.choose(qo, kv, reqs[0]) == line.after
                    if low < qo <= high and qo - 1 <= limits.get(line.before, high):
                        assert decision.choose(qo - 1, kv, reqs[0]) == line.before
    assert lines > 10


@given(tables())
def test_ranges_of_requests_cover_the_measured_ones_once(table: Table) -> None:
    ranges = request_ranges(table)
    low, high = table.measured.num_reqs
    assert (ranges[0][0], ranges[-1][1]) == (low, high)
    assert all(first[1] + 1 == second[0] for first, second in pairwise(ranges))
    assert all(start <= end for start, end in ranges)


@given(servable)
def test_an_outline_stays_inside_what_its_area_and_a_forward_can_be(table: Table) -> None:
    for area in areas(table, table.measured.num_reqs[0]):
        for qo, kv in area.outline():
            assert area.kv_tokens[0] <= kv <= area.kv_tokens[1]
            assert min(area.num_qo_tokens[0], kv + 1) <= qo <= min(area.num_qo_tokens[1], kv + 1)


def test_typed_constants_are_drawn_where_they_lie() -> None:
    box = (1, 65536), (1024, 1 << 20)
    threshold, ratio, chunk = (rule.ends(*box) for rule in typed_rules("prefill_attention"))
    assert threshold == ((11673, 1024), (11673, 1 << 20))
    assert ratio == ((2, 1024), (2048, 1 << 20))
    assert chunk == ((8192, 1024), (8192, 1 << 20))
    assert [rule.num_qo_tokens for rule in typed_rules("indexer_logits")] == [8192]
    assert typed_rules("head_padding") == ()


def test_a_typed_constant_outside_of_the_measured_range_is_not_drawn() -> None:
    assert [rule.ends((1, 100), (1024, 2048)) for rule in typed_rules("indexer_metadata")] == [(), ()]
