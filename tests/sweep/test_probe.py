"""A probe ends at the true bound, both of its sides seen in fresh workers, whatever it was told before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, Site, SiteName
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import CAPABILITY, Outcome
from mla_tune.sweep.probe import Prober, known_counts, max_query_tokens, search, try_shape
from mla_tune.sweep.worker.messages import Added

LARGEST = 131072
SITE = Site.parse("prefill_attention/c128a/h64")
failure = st.sampled_from(sorted(CAPABILITY))


def searched(limit: int, largest: int, runs: int, fails: int | None, how: Outcome) -> tuple[int, int | None, list[int]]:
    """What a search finds of a candidate that runs up to ``limit``, and the counts that it tried."""
    steps = search(largest, runs, fails)
    tried: list[int] = []
    try:
        count = next(steps)
        while True:
            tried.append(count)
            count = steps.send(Outcome.OK if count <= limit else how)
    except StopIteration as end:
        found, failed = end.value
        return found, failed, tried


@given(st.integers(0, 2 * LARGEST), st.integers(1, LARGEST), st.integers(0, LARGEST), st.integers(0, LARGEST), failure)
def test_the_bound_is_found_exactly_wherever_the_search_was_told_to_look(
    limit: int, largest: int, runs: int, fails: int, how: Outcome
) -> None:
    told = runs < fails <= largest
    found, failed, tried = searched(limit, largest, runs if told else 0, fails if told else None, how)
    assert (found, failed) == ((largest, None) if limit >= largest else (limit, limit + 1))
    # Both sides are evidence of this search, each count is tried once, and never one beyond the largest.
    assert found == 0 or found in tried
    assert failed is None or failed in tried
    assert len(set(tried)) == len(tried)
    assert all(1 <= count <= largest for count in tried)


@given(st.integers(0, LARGEST), failure)
def test_a_search_takes_one_try_for_each_doubling_and_each_halving(limit: int, how: Outcome) -> None:
    _, _, tried = searched(limit, LARGEST, 0, None, how)
    assert len(tried) <= 2 * LARGEST.bit_length()


def test_a_search_that_is_told_the_neighbours_tries_just_these_the_failure_first() -> None:
    assert searched(14336, LARGEST, 14336, 14337, Outcome.CRASH) == (14336, 14337, [14337, 14336])


@pytest.mark.parametrize("how", [Outcome.NO_MEMORY, Outcome.TIMEOUT, Outcome.UNSUPPORTED])
def test_what_says_nothing_about_the_build_ends_the_search_without_a_bound(how: Outcome) -> None:
    assert searched(1000, LARGEST, 0, None, how) == (512, None, [1 << n for n in range(11)])


def test_no_search_goes_beyond_the_longest_context_of_the_models_at_its_site() -> None:
    for model in MODELS.values():
        for layer in model.site_layers(SiteName.PREFILL_ATTENTION):
            for h_q in model.heads:
                assert max_query_tokens(model.site(SiteName.PREFILL_ATTENTION, layer, h_q)) >= model.max_context
    assert max_query_tokens(Site.parse("prefill_attention/dsa/h128/k2048")) == MODELS["deepseek-v3.2"].max_context


def attempt(count: int, outcome: Outcome) -> Try:
    return Try(SITE, "with_kvcache", Shape(1, count, 8192), outcome, "" if outcome is Outcome.OK else "reason")


def test_tries_around_a_suspect_have_its_requests_and_context_as_far_as_their_query_tokens_allow() -> None:
    around = Shape(16, 4096, 1 << 21)
    assert try_shape(4096, around) == around
    assert try_shape(3, around) == Shape(3, 3, 1 << 21)
    assert try_shape(3) == Shape(1, 3, 8192)
    assert try_shape(9000) == Shape(1, 9000, 9000)


def test_a_count_that_ever_failed_fails() -> None:
    elsewhere = replace(attempt(8, Outcome.OK), shape=Shape(2, 8, 9000))
    for entries in ([elsewhere, attempt(8, Outcome.CRASH)], [attempt(8, Outcome.CRASH), elsewhere]):
        assert known_counts([], entries) == {(SITE, "with_kvcache"): [(8, False)]}


def test_real_workers_find_the_limit_of_a_candidate_that_aborts_from_some_count_on() -> None:
    made: list[Try] = []
    with Prober("cpu", timeout_s=60, added=Added("tests.sweep.hostile", ("aborts_above_9",))) as prober:
        bound = prober.bound(SITE, "aborts_above_9", 64, made.append)
        known = [(entry.shape.num_qo_tokens, entry.outcome is Outcome.OK) for entry in made]
        again = prober.bound(SITE, "aborts_above_9", 64, lambda _: None, known)
    assert (bound.runs_at, bound.fails_at) == (9, 10)
    assert bound.reason == "worker ended with exit code -6: terminate called: an invariant of the kernel does not hold"
    assert list(bound.tries) == made
    assert [entry.shape.num_qo_tokens for entry in made] == [1, 2, 4, 8, 16, 12, 10, 9]
    assert all((entry.first_call_s is not None) is (entry.outcome is Outcome.OK) for entry in made)
    assert (again.runs_at, again.fails_at, len(again.tries)) == (9, 10, 2)


def test_a_candidate_without_a_limit_says_so_and_a_spent_budget_too() -> None:
    with Prober("cpu", timeout_s=60) as prober:
        bound = prober.bound(SITE, "sparse_fwd", 16, lambda _: None)
        late = prober.bound(SITE, "sparse_fwd", 16, lambda _: None, deadline=0.0)
    assert (bound.runs_at, bound.fails_at, bound.reason, len(bound.tries)) == (16, None, "", 5)
    assert (late.runs_at, late.fails_at, late.reason) == (0, None, "the budget is used up")
