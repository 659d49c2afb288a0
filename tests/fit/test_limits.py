"""What bounds a candidate: limits that a probe proved, suspects of a sweep, and what is neither."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest

from mla_tune.errors import FitError
from mla_tune.fit.costs import CostModel
from mla_tune.fit.limits import is_unsafe, limits, suspects
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import scope, scopes
from mla_tune.fit.table_rows import FittedTable, fit_policy, fit_table
from mla_tune.fit.usable import usable
from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import LimitEvidence
from mla_tune.policy.schema import Choice, Ineligible, Limit, Row, Table
from mla_tune.sites.candidates import names_at
from mla_tune.sites.engines import Engine
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import PLAIN, Conditions, LayerType, Site, SiteName
from mla_tune.store.export import read_export
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import CAPABILITY, PER_LAYER_TOTAL, Measurement, Outcome, Regime, Role
from tests.fit.synthetic import C4A, ENVIRONMENT, FLASH, METADATA, SOURCE, V3_2, World, sweep

LAUNCH = (Outcome.RUNTIME_ERROR, "CUDA error:\n  invalid configuration\targument")
DSA = V3_2.site(SiteName.PREFILL_ATTENTION, LayerType.DSA)
OUTSIDE = [
    "worker ended with exit code -9",
    "worker ended with exit code -15",
    "worker ended with exit code 137",
    "NVMLError_Unknown: Unknown Error",
    "OSError: [Errno 28] No space left on device: '/root/.triton/cache'",
    "RuntimeError: Failed to find C compiler. Please specify via CC environment variable.",
    "AcceleratorError: CUDA error: uncorrectable ECC error encountered",
    "worker ended with exit code 1: what(): std::bad_alloc",
]
EXPORTS = Path(__file__).parents[2] / "db"


def tried(candidate: str, count: int, outcome: Outcome = Outcome.OK, site: Site = METADATA, kv_tokens: int = 0) -> Try:
    detail = "" if outcome is Outcome.OK else "fails to launch"
    return Try(site, candidate, Shape(1, count, max(kv_tokens, count, 8192)), outcome, detail)


def fitted(rows: Iterable[Measurement], tries: Iterable[Try] = (), engine: Engine = Engine.SGLANG) -> Table:
    """The table of the rows' one site, for the first model that has it."""
    return judged(rows, tries, engine).table


def judged(rows: Iterable[Measurement], tries: Iterable[Try] = (), engine: Engine = Engine.SGLANG) -> FittedTable:
    """The same with its evidence."""
    kept = list(rows)
    site = kept[0].site
    model = V3_2 if site.layer is LayerType.DSA else FLASH
    found = fit_table(CostModel(ENVIRONMENT, kept, tries), scope(site.name, model, site.layer, site.h_q, engine))
    assert found is not None
    return found


def found(world: World, *tries: Try) -> tuple[LimitEvidence, ...]:
    return limits(Observations(sweep(world, [METADATA], held_out=4), tries), [METADATA], names_at(METADATA))


def failed(shape: Shape, outcome: Outcome, detail: str, candidate: str = "sparse_fwd", site: Site = C4A) -> Measurement:
    return Measurement(site, shape, Role.FIT, candidate, PER_LAYER_TOTAL, Regime.GRAPH, outcome, detail)


@pytest.mark.parametrize("outcome", sorted(CAPABILITY))
def test_two_neighbours_of_which_a_probe_saw_one_run_and_the_next_fail_are_a_limit(outcome: Outcome) -> None:
    (limit,) = found(World(), tried("deep_gemm", 14496), tried("deep_gemm", 14497, outcome))
    assert (limit.candidate, limit.num_qo_tokens, limit.fails_at) == ("deep_gemm", 14496, 14497)
    assert (limit.found_by, limit.reason) == ("probe", "fails to launch")


@pytest.mark.parametrize("outcome", sorted(CAPABILITY))
def test_a_failure_of_a_sweep_is_a_suspect_and_no_limit(outcome: Outcome) -> None:
    world = World(failures={("deep_gemm", 15000): (outcome, "fails to launch")})
    assert found(world) == ()
    observations = Observations(sweep(world, [METADATA], held_out=4))
    (suspect,) = suspects(observations, [METADATA], names_at(METADATA))
    assert (suspect.candidate, suspect.runs_at, suspect.shape.num_qo_tokens) == ("deep_gemm", 8192, 16384)
    assert suspect.reason == "fails to launch"


def test_a_failure_whose_neighbour_did_not_run_in_a_fresh_process_is_no_limit() -> None:
    assert found(World(), tried("deep_gemm", 8192), tried("deep_gemm", 16384, Outcome.CRASH)) == ()
    assert found(World(), tried("deep_gemm", 16384, Outcome.CRASH)) == ()
    observations = Observations(sweep(World(), [METADATA], held_out=4), [tried("deep_gemm", 16384, Outcome.CRASH)])
    assert [s.shape.num_qo_tokens for s in suspects(observations, [METADATA], names_at(METADATA))] == [16384]


@pytest.mark.parametrize("outcome", [Outcome.NO_MEMORY, Outcome.UNSUPPORTED, Outcome.TIMEOUT, Outcome.DISTURBED])
def test_what_says_nothing_about_the_kernel_is_neither(outcome: Outcome) -> None:
    world = World(failures={("deep_gemm", 15000): (outcome, "not today")})
    assert found(world, tried("deep_gemm", 14999), tried("deep_gemm", 15000, outcome)) == ()
    assert suspects(Observations(sweep(world, [METADATA], held_out=4)), [METADATA], names_at(METADATA)) == ()


def struck(detail: str) -> list[Measurement]:
    """A sweep of V3.2 in which ``sparse_fwd`` failed with ``detail`` at one point of 64 query tokens."""
    shape = Shape(1, 64, 131072)
    rows = sweep(World(), [DSA], held_out=6, model=V3_2)
    kept = [m for m in rows if not (m.candidate == "sparse_fwd" and m.shape == shape)]
    return [*kept, failed(shape, Outcome.CRASH, detail, site=DSA)]


@pytest.mark.parametrize("detail", OUTSIDE)
def test_trouble_around_a_kernel_is_none_of_its_capability(detail: str) -> None:
    kept = usable(struck(detail))
    (spoiled,) = [m for m in kept if m.outcome is not Outcome.OK]
    assert (spoiled.outcome, spoiled.detail) == (Outcome.DISTURBED, detail)
    observations = Observations(kept)
    assert limits(observations, [DSA], names_at(DSA)) == ()
    assert suspects(observations, [DSA], names_at(DSA)) == ()


def test_a_worker_killed_at_64_query_tokens_leaves_the_table_as_it_was() -> None:
    """Such a row of sparse_fwd made a limit of 62, and took the table from 1.000 to 1.115 on held-out points."""
    first = judged(sweep(World(), [DSA], held_out=6, model=V3_2))
    second = judged(usable(struck(OUTSIDE[0])))
    before, after = first.table, second.table
    assert after.limits == ()
    assert second.evidence.held_out.slowdown[0].mean <= first.evidence.held_out.slowdown[0].mean + 0.001
    assert Decision(after).choose(4096, 8192, 1) == Decision(before).choose(4096, 8192, 1) == "sparse_fwd"


@pytest.mark.parametrize("detail", OUTSIDE)
def test_a_try_that_was_ended_from_outside_is_no_side_of_a_limit(detail: str) -> None:
    ended = replace(tried("deep_gemm", 63, Outcome.CRASH), detail=detail)
    assert found(World(), tried("deep_gemm", 62), ended) == ()


def test_one_crash_amid_larger_shapes_that_ran_bars_nothing() -> None:
    rows = struck("worker ended with exit code -11")
    assert suspects(Observations(rows), [DSA], names_at(DSA)) == ()


def test_a_wrong_result_stays_a_suspect_whatever_ran_above_it_until_it_is_right_in_a_fresh_process() -> None:
    shape = Shape(1, 64, 131072)
    rows = [m for m in sweep(World(), [C4A]) if not (m.candidate == "sparse_fwd" and m.shape == shape)]
    rows.append(failed(shape, Outcome.WRONG_RESULT, "differs"))
    (suspect,) = suspects(Observations(rows), [C4A], names_at(C4A))
    assert (suspect.shape, suspect.runs_at) == (shape, 37)
    elsewhere = tried("sparse_fwd", 64, site=C4A)
    assert suspects(Observations(rows, [elsewhere]), [C4A], names_at(C4A)) == (suspect,)
    there = replace(elsewhere, shape=shape)
    assert suspects(Observations(rows, [there]), [C4A], names_at(C4A)) == ()


def test_the_newest_try_at_a_count_counts() -> None:
    """A later try of a shape replaces the earlier one in the store, so that only it is read here."""
    neighbours = [tried("deep_gemm", 62), tried("deep_gemm", 63, Outcome.CRASH)]
    assert [limit.fails_at for limit in found(World(), *neighbours)] == [63]
    assert found(World(), *neighbours[:1], tried("deep_gemm", 63)) == ()


def test_a_reason_is_one_short_line() -> None:
    entry = replace(tried("deep_gemm", 15000, LAUNCH[0]), detail=LAUNCH[1] + " x" * 300)
    (limit,) = found(World(), tried("deep_gemm", 14999), entry)
    assert limit.reason.startswith("CUDA error: invalid configuration argument x")
    assert limit.reason.isprintable()
    assert len(limit.reason) <= 160


FAILS_FROM_3000 = World(failures={("with_kvcache", 3000): LAUNCH})
PROVEN = [tried("with_kvcache", 2999, site=C4A), tried("with_kvcache", 3000, Outcome.RUNTIME_ERROR, site=C4A)]


@pytest.mark.parametrize("tries", [PROVEN, []], ids=["limit", "suspect"])
def test_a_candidate_is_not_answered_from_its_failure_up_proven_or_not(tries: list[Try]) -> None:
    table = fitted(sweep(FAILS_FROM_3000, [C4A]), tries)
    assert [limit.num_qo_tokens for limit in table.limits] == ([2999] if tries else [])
    answers = {
        Decision(table).choose(q, kv, r) for q in (3000, 3500, 5000, 16000) for kv in (1 << 17, 1 << 20) for r in (1, 2)
    }
    assert answers == {"sparse_fwd"}
    assert Decision(table).choose(64, 1 << 26, 64) == "with_kvcache"


@cache
def fitted_with_variants() -> Table:
    return fitted(sweep(World(not_measured=()), [C4A], held_out=4), engine=Engine.OWN)


def table_past_limits(*slow: str) -> Table:
    """A table with three candidates, of which the incumbent and what its rows answer end at 100 query tokens."""
    table = fitted_with_variants()
    names = (table.incumbent, "with_kvcache")
    bound = tuple(Limit(candidate=n, num_qo_tokens=100) for n in names)
    barred = tuple(Ineligible(candidate=name, first_call_s=9.0) for name in slow)
    only = Row(choices=(Choice(candidate="with_kvcache"),))
    return msgspec.structs.replace(table, limits=bound, ineligible=barred, rows=(only,))


def test_past_a_limit_a_candidate_with_slow_first_calls_comes_last_of_those_that_run() -> None:
    first, second = "sparse_fwd_fused", "sparse_fwd_selected"
    assert Decision(table_past_limits()).choose(101, 8192, 1) == first
    assert Decision(table_past_limits(first)).choose(101, 8192, 1) == second
    assert Decision(table_past_limits(second)).choose(101, 8192, 1) == first
    assert Decision(table_past_limits(first, second)).choose(101, 8192, 1) == first


def test_a_candidate_that_fails_at_its_smallest_count_is_left_out() -> None:
    kept = [m for m in sweep(World(), [C4A]) if not (m.candidate == "with_kvcache" and m.shape.num_qo_tokens == 1)]
    broken = World(failures={("with_kvcache", 1): (Outcome.WRONG_RESULT, "differs from the reference")})
    first = [m for m in sweep(broken, [C4A]) if m.candidate == "with_kvcache" and m.shape.num_qo_tokens == 1]
    observations = Observations([*kept, *first])
    assert is_unsafe(observations, [C4A], "with_kvcache")
    assert not is_unsafe(observations, [C4A], "sparse_fwd")
    table = fitted([*kept, *first])
    assert table.candidates == ("sparse_fwd",)


@pytest.mark.parametrize("probed", [False, True], ids=["seen by a sweep", "seen by a probe"])
def test_a_candidate_that_runs_at_8k_of_context_and_crashes_at_128k_at_its_least_count_is_not_served(
    probed: bool,
) -> None:
    rows = [m for m in sweep(World(), [C4A]) if m.candidate != "with_kvcache" or m.shape.kv_tokens <= 8192]
    least = min(m.shape.num_qo_tokens for m in rows if m.candidate == "with_kvcache" and m.outcome is Outcome.OK)
    large = Shape(1, least, 131072)
    rows.append(failed(large, *LAUNCH, candidate="with_kvcache"))
    assert {m.shape.kv_tokens for m in rows if m.candidate == "with_kvcache" and m.shape.num_qo_tokens == least} >= {
        8192,
        131072,
    }
    tries = [tried("with_kvcache", least, site=C4A)]
    tries += [replace(tried("with_kvcache", least, Outcome.CRASH, site=C4A), shape=large)] if probed else []
    observations = Observations(rows, tries)
    assert limits(observations, [C4A], ["with_kvcache"]) == ()
    assert is_unsafe(observations, [C4A], "with_kvcache")
    table = fitted(rows, tries)
    assert table.candidates == ("sparse_fwd",)


def test_limits_on_every_candidate_leave_no_table_to_serve() -> None:
    tries = [*PROVEN, *(replace(entry, candidate="sparse_fwd") for entry in PROVEN)]
    with pytest.raises(FitError, match="limits on all"):
        fit_policy(ENVIRONMENT, sweep(World(), [C4A]), tries, source=SOURCE)


def test_the_committed_limits_of_an_h200_were_found_by_probes_and_hold() -> None:
    for name, mixed in (("nvidia-h200", [30219]), ("nvidia-h200.sglang", [])):
        export = read_export(EXPORTS / f"{name}.jsonl")
        provider = next((m.site.provider for m in export.measurements if m.site.provider), None)
        conditions = Conditions(0, provider)
        observations = Observations(usable(export.measurements, export.tuned, conditions), export.tries)
        sites = {site for scope in scopes(conditions) for site, _ in scope.parts}
        bounds = {
            (PLAIN.at(site).key, limit.candidate): (limit.num_qo_tokens, limit.fails_at, limit.found_by)
            for site in sites
            for limit in limits(observations, [site], names_at(site))
        }
        assert bounds == {
            ("indexer_metadata/c4a", "deep_gemm"): (14496, 14497, "probe"),
            ("indexer_metadata/dsa", "deep_gemm"): (14496, 14497, "probe"),
            ("prefill_attention/swa_only/h64", "with_kvcache"): (125786, 125787, "probe"),
            ("prefill_attention/c4a/h64/k512", "with_kvcache"): (83379, 83380, "probe"),
            ("prefill_attention/c4a/h128/k1024", "with_kvcache"): (33712, 33713, "probe"),
            ("prefill_attention/c128a/h64", "with_kvcache"): (65903, 65904, "probe"),
            ("prefill_attention/c128a/h128", "with_kvcache"): (33928, 33929, "probe"),
        }
        open_ones = [s for site in sites for s in suspects(observations, [site], names_at(site))]
        # What a sweep alone saw, and no probe: not a limit any more.
        assert [s.shape.num_qo_tokens for s in open_ones] == mixed
