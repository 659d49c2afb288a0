"""Failures that become limits, and those that do not."""

from __future__ import annotations

import pytest

from mla_tune.errors import FitError
from mla_tune.fit.limits import is_unsafe, limits
from mla_tune.fit.observations import Observations
from mla_tune.fit.table_rows import fit_policy
from mla_tune.policy.decision import decide
from mla_tune.policy.schema import Limit
from mla_tune.sites.candidates import names_at
from mla_tune.store.measurement import Outcome
from tests.fit.synthetic import C4A, ENVIRONMENT, METADATA, SOURCE, World, sweep

LAUNCH = (Outcome.RUNTIME_ERROR, "CUDA error:\n  invalid configuration\targument")


def _limits(world: World) -> tuple[Limit, ...]:
    return limits(Observations(sweep(world, [METADATA], held_out=4)), [METADATA], names_at(METADATA))


@pytest.mark.parametrize("outcome", [Outcome.RUNTIME_ERROR, Outcome.CRASH, Outcome.WRONG_RESULT, Outcome.COMPILE_ERROR])
def test_a_failure_from_some_count_on_becomes_a_limit(outcome: Outcome) -> None:
    (limit,) = _limits(World(failures={("deep_gemm", 15000): (outcome, "fails to launch")}))
    assert (limit.candidate, limit.num_qo_tokens, limit.fails_at) == ("deep_gemm", 8192, 16384)
    assert (limit.found_by, limit.reason) == ("sweep", "fails to launch")


@pytest.mark.parametrize("outcome", [Outcome.NO_MEMORY, Outcome.UNSUPPORTED, Outcome.TIMEOUT])
def test_what_says_nothing_about_the_kernel_is_no_limit(outcome: Outcome) -> None:
    assert _limits(World(failures={("deep_gemm", 15000): (outcome, "not today")})) == ()


def test_a_reason_is_one_short_line() -> None:
    (limit,) = _limits(World(failures={("deep_gemm", 15000): (LAUNCH[0], LAUNCH[1] + " x" * 300)}))
    assert limit.reason.startswith("CUDA error: invalid configuration argument x")
    assert limit.reason.isprintable()
    assert len(limit.reason) <= 160


def test_a_candidate_past_its_limit_is_never_answered() -> None:
    failures = {("with_kvcache", 3000): LAUNCH}

    (table,) = fit_policy(ENVIRONMENT, sweep(World(failures=failures), [C4A]), source=SOURCE).tables
    (limit,) = table.limits
    answers = {
        decide(table, q, kv, 1).candidate for q in (limit.num_qo_tokens + 1, 5000, 32768) for kv in (1 << 17, 1 << 26)
    }
    assert limit.fails_at > limit.num_qo_tokens
    assert answers == {"sparse_fwd"}
    assert decide(table, 64, 1 << 26, 64).candidate == "with_kvcache"


def test_a_candidate_that_fails_at_its_smallest_count_is_left_out() -> None:
    world = World()
    kept = [m for m in sweep(world, [C4A]) if not (m.candidate == "with_kvcache" and m.shape.num_qo_tokens == 1)]
    broken = World(failures={("with_kvcache", 1): (Outcome.WRONG_RESULT, "differs from the reference")})
    first = [m for m in sweep(broken, [C4A]) if m.candidate == "with_kvcache" and m.shape.num_qo_tokens == 1]
    observations = Observations([*kept, *first])
    assert is_unsafe(observations, [C4A], "with_kvcache")
    assert not is_unsafe(observations, [C4A], "sparse_fwd")
    (table,) = fit_policy(ENVIRONMENT, [*kept, *first], source=SOURCE).tables
    assert table.candidates == ("sparse_fwd",)


def test_limits_on_every_candidate_leave_no_table_to_serve() -> None:
    world = World(failures={("with_kvcache", 3000): LAUNCH, ("sparse_fwd", 3000): LAUNCH})
    with pytest.raises(FitError, match="limits on all"):
        fit_policy(ENVIRONMENT, sweep(world, [C4A]), source=SOURCE)
