"""A sweep's failures are settled in fresh processes: cleared, or bounded by two neighbours; nothing is left unsaid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mla_tune.cli.limit_search import Found, open_suspects, search_limits, settle
from mla_tune.fit.limits import limits
from mla_tune.fit.observations import Observations
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import PLAIN, Site
from mla_tune.store.database import Database
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import PER_LAYER_TOTAL, Measurement, Outcome, Regime, Role
from mla_tune.sweep.grid import Point
from mla_tune.sweep.probe import Prober
from mla_tune.sweep.runner import missing_tasks
from tests.store.strategies import CPU_ENVIRONMENT

SITE = Site.parse("prefill_attention/c4a/h64/k512")
WIDE = Shape(4, 4096, 1 << 20)
Capable = Callable[[Shape], bool]


class ScriptedProber(Prober):
    """A prober whose fresh workers run what ``capable`` says."""

    def __init__(self, capable: Capable) -> None:
        self.environment = CPU_ENVIRONMENT
        self._capable = capable

    def _attempt(self, site: Site, candidate: str, shape: Shape) -> Try:
        ran = self._capable(shape)
        return Try(site, candidate, shape, Outcome.OK if ran else Outcome.CRASH, "" if ran else "aborted")

    def support(self, sites: object) -> dict[tuple[Site, str], str | None]:
        return {(SITE, "with_kvcache"): "FlashMLA has kernels for sm90 and sm100; this GPU is sm120"}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(tmp_path / "a.db") as opened:
        yield opened


def row(shape: Shape, outcome: Outcome, detail: str = "") -> Measurement:
    us = {"latency_us": 1.0, "num_samples": 1, "samples_us": (1.0,)} if outcome is Outcome.OK else {}
    return Measurement(SITE, shape, Role.FIT, "sparse_fwd", PER_LAYER_TOTAL, Regime.EAGER, outcome, detail, **us)  # type: ignore[arg-type]


def settled(database: Database, capable: Capable, budget_s: float = 60.0) -> Found:
    database.record(CPU_ENVIRONMENT, [row(WIDE, Outcome.CRASH, "worker ended with exit code -11")])
    return settle(ScriptedProber(capable), database, PLAIN, budget_s, lambda _: None)


def test_a_failure_that_occurs_again_is_bounded_at_its_own_requests_and_context(database: Database) -> None:
    (bound,) = settled(database, lambda shape: shape.num_qo_tokens <= 3000 or shape.kv_tokens < WIDE.kv_tokens).bounds
    assert (bound.runs_at, bound.fails_at, bound.cleared) == (3000, 3001, False)
    assert all(entry.shape.kv_tokens == WIDE.kv_tokens for entry in bound.tries)
    assert open_suspects(database, CPU_ENVIRONMENT, PLAIN) == []
    observations = Observations(database.measurements(CPU_ENVIRONMENT.id), database.tries(CPU_ENVIRONMENT.id))
    (limit,) = limits(observations, [SITE], ["sparse_fwd"])
    assert (limit.num_qo_tokens, limit.fails_at, limit.found_by) == (3000, 3001, "probe")


def test_a_failure_that_does_not_occur_again_is_cleared_by_one_try_and_measured_again(database: Database) -> None:
    plan = [Point(SITE, WIDE)]
    others = ("sparse_fwd_fused", "sparse_fwd_selected", "with_kvcache")
    found = settled(database, lambda shape: True)
    assert found.cleared
    assert [entry.shape for bound in found.bounds for entry in bound.tries] == [WIDE]
    assert open_suspects(database, CPU_ENVIRONMENT, PLAIN) == []
    (task,) = missing_tasks(database, CPU_ENVIRONMENT, plan, without=others)
    assert task.candidates == ("sparse_fwd",)
    database.record(CPU_ENVIRONMENT, [row(WIDE, Outcome.OK)])
    assert missing_tasks(database, CPU_ENVIRONMENT, plan, without=others) == []


def test_what_no_budget_is_left_for_is_said_and_stays_a_suspect(database: Database) -> None:
    (bound,) = settled(database, lambda shape: True, budget_s=0.0).bounds
    assert (bound.reason, bound.tries) == ("not tried: the budget is used up", ())
    assert [suspect.shape for suspect in open_suspects(database, CPU_ENVIRONMENT, PLAIN)] == [WIDE]


def test_a_candidate_that_fails_at_one_query_token_in_a_fresh_process_gets_no_limit(database: Database) -> None:
    (bound,) = settled(database, lambda shape: False).bounds
    assert (bound.runs_at, bound.fails_at) == (0, 1)


def test_a_probe_says_what_it_did_not_try(database: Database) -> None:
    wanted = {(SITE, "with_kvcache"): 8, (SITE, "sparse_fwd"): 8}
    prober = ScriptedProber(lambda shape: True)
    unsupported, searched = search_limits(prober, database, wanted, 60.0, lambda _: None).bounds
    assert unsupported.reason == "not tried: FlashMLA has kernels for sm90 and sm100; this GPU is sm120"
    assert (searched.runs_at, searched.reason) == (8, "")
    _, late = search_limits(prober, database, wanted, 0.0, lambda _: None).bounds
    assert (late.reason, late.tries) == ("not tried: the budget is used up", ())
