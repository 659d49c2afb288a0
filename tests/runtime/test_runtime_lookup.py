"""``choose`` answers what a reading of the table by hand answers, everywhere, and never past a limit."""

from __future__ import annotations

import random
import tracemalloc
from fractions import Fraction
from itertools import product, repeat

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mla_tune.errors import PolicyError
from mla_tune.policy.decision import Decision, Reason
from mla_tune.policy.schema import Choice, Limit, Range, Row, Table
from mla_tune.policy.threshold import Threshold
from mla_tune.runtime.dispatcher import Dispatcher, Resolved
from tests.policy.strategies import policy, table, tables

EVERY_INT = st.integers(0, 1 << 62) | st.integers(-5, 50_000)


def resolved(of: Table) -> Resolved:
    """The only table of a policy, as a server resolves it."""
    return Dispatcher(policy(of), source="test").resolve(of.site, model=of.model, layer=of.layer, h_q=of.h_q)


def runs(of: Table, candidate: str, num_qo_tokens: int) -> bool:
    """Whether no limit of ``candidate`` is passed."""
    return not any(limit.candidate == candidate and num_qo_tokens > limit.num_qo_tokens for limit in of.limits)


def read_by_hand(of: Table, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> str:
    """The contract, line by line: the oracle of these tests."""
    measured = of.measured
    answer = of.incumbent
    ranges = (measured.num_qo_tokens, num_qo_tokens), (measured.kv_tokens, kv_tokens), (measured.num_reqs, num_reqs)
    if all(low <= value <= high for (low, high), value in ranges):
        reqs_from = max(row.num_reqs_from for row in of.rows if row.num_reqs_from <= num_reqs)
        group = [row for row in of.rows if row.num_reqs_from == reqs_from]
        row = max((row for row in group if row.kv_tokens_from <= kv_tokens), key=lambda row: row.kv_tokens_from)
        for choice in row.choices:
            (low, high), (start, end) = choice.threshold.num_qo_tokens, choice.threshold.kv_tokens
            if num_qo_tokens >= low + Fraction(high - low, end - start) * (kv_tokens - start):
                answer = choice.candidate
    if runs(of, answer, num_qo_tokens):
        return answer
    return next(name for name in (of.incumbent, *of.candidates) if runs(of, name, num_qo_tokens))


def corners(of: Table) -> list[tuple[int, int, int]]:
    """Every point beside a boundary of the table, on both axes."""
    q = {0, -1, 1 << 62, *of.measured.num_qo_tokens, *(limit.num_qo_tokens for limit in of.limits)}
    q |= {count for row in of.rows for choice in row.choices for count in choice.threshold.num_qo_tokens}
    kv = {0, -1, 1 << 62, *of.measured.kv_tokens, *(row.kv_tokens_from for row in of.rows)}
    reqs = {0, -1, 1 << 62, *of.measured.num_reqs, *(row.num_reqs_from for row in of.rows)}
    q, kv, reqs = ({x + d for x in axis for d in (-1, 0, 1)} for axis in (q, kv, reqs))
    every = list(product(q, kv, reqs))
    return random.Random(0).sample(every, min(len(every), 2000))


def leaves_a_candidate(of: Table) -> bool:
    """Whether some candidate has no limit, and thus can run at every count."""
    return bool(set(of.candidates) - {limit.candidate for limit in of.limits})


@settings(max_examples=200, deadline=None)
@given(tables(), st.lists(st.tuples(EVERY_INT, EVERY_INT, EVERY_INT), max_size=20))
def test_choose_agrees_with_reading_the_table_by_hand(of: Table, points: list[tuple[int, int, int]]) -> None:
    assume(leaves_a_candidate(of))
    site = resolved(of)
    for point in points + corners(of):
        answer = site.choose(*point)
        assert answer == read_by_hand(of, *point)
        assert answer in of.candidates
        assert runs(of, answer, point[0])


@settings(max_examples=100, deadline=None)
@given(tables())
@example(table())
def test_an_explanation_names_what_choose_answers_and_why(of: Table) -> None:
    assume(leaves_a_candidate(of))
    site = resolved(of)
    for point in corners(of):
        found = site.explain(*point)
        assert found.candidate == site.choose(*point)
        if found.reason is Reason.TABLE:
            assert found.num_qo_tokens_from is not None
            assert found.num_qo_tokens_from <= point[0]
            start = (found.num_reqs_from, found.kv_tokens_from)
            row = next(row for row in of.rows if (row.num_reqs_from, row.kv_tokens_from) == start)
            assert found.candidate in {choice.candidate for choice in row.choices}


@settings(max_examples=150, deadline=None)
@given(tables())
def test_a_table_is_refused_at_resolve_exactly_if_all_its_candidates_are_limited(of: Table) -> None:
    if leaves_a_candidate(of):
        resolved(of)
    else:
        with pytest.raises(PolicyError, match="must leave one candidate at every token count"):
            resolved(of)


def test_the_crossovers_of_a_table_are_where_it_says() -> None:
    choose = resolved(table()).choose
    assert choose(4095, 100_000, 1) == "with_kvcache"
    assert choose(4096, 100_000, 1) == "sparse_fwd"
    assert choose(5999, 1 << 20, 1) == "with_kvcache"
    assert choose(6000, 1 << 20, 1) == "sparse_fwd"
    halfway = ((1 << 20) + (1 << 26)) // 2
    assert choose(8999, halfway, 1) == "with_kvcache"
    assert choose(9000, halfway, 15) == "sparse_fwd"
    assert choose(11999, 1 << 26, 1) == "with_kvcache"
    assert choose(12000, 1 << 26, 1) == "sparse_fwd"
    assert choose(32768, halfway, 16) == "with_kvcache"


def test_the_incumbent_is_kept_outside_the_measured_range_of_any_axis() -> None:
    site = resolved(table())
    for point in ((15, 100_000, 1), (32769, 100_000, 1), (100, 2047, 1), (100, (1 << 26) + 1, 1), (100, 100_000, 65)):
        assert site.choose(*point) == "sparse_fwd"
        assert site.explain(*point).reason is Reason.OUTSIDE
    assert site.choose(16, 2048, 1) == "with_kvcache"


def test_past_its_limit_the_incumbent_gives_way_even_where_nothing_was_measured() -> None:
    limit = Limit(candidate="sparse_fwd", num_qo_tokens=11622)
    site = resolved(table(limits=(limit,)))
    assert site.choose(11622, 100_000, 1) == "sparse_fwd"
    assert site.choose(11623, 100_000, 1) == "with_kvcache"
    assert site.choose(1 << 40, 1 << 50, 1) == "with_kvcache"
    assert site.explain(11623, 100_000, 1).reason is Reason.LIMIT
    assert site.explain(11623, 100_000, 1).num_qo_tokens_from == 4096


def one_row(*choices: Choice) -> Table:
    """A table that answers the same for all contexts, measured everywhere."""
    everywhere = Range(num_qo_tokens=(1, 1 << 62), kv_tokens=(1, 1 << 62), num_reqs=(1, 1 << 62))
    return table(measured=everywhere, rows=(Row(choices=choices),))


@pytest.mark.parametrize(
    "of",
    [
        table(),
        one_row(Choice(candidate="sparse_fwd")),
        one_row(
            Choice(candidate="sparse_fwd"),
            Choice(threshold=Threshold.level(900), candidate="with_kvcache"),
        ),
    ],
    ids=["two axes", "constant", "few choices"],
)
def test_a_call_allocates_nothing(of: Table) -> None:
    choose = Decision(of).choose
    choose(8192, 40_000_000, 1)
    calls = repeat(None, 20_000)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in calls:
            choose(8192, 40_000_000, 1)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after == before
    assert peak - before < 200  # the iterator's own object, and the integers that a comparison makes and drops
