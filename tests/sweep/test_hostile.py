"""A whole sweep with a candidate of every kind of misbehaviour in it: each costs its own rows, and nothing else is lost.

What became of each is printed at the end of the test run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from mla_tune.errors import FitError
from mla_tune.fit.observations import Observations
from mla_tune.fit.table_rows import fit_policy
from mla_tune.hardware.sku import Environment
from mla_tune.policy.schema import Policy, Source
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.database import Database
from mla_tune.store.measurement import Measurement, Outcome, Role, Stop
from mla_tune.sweep.grid import Point
from mla_tune.sweep.runner import Report, Sweep
from mla_tune.sweep.worker.messages import Added
from tests.conftest import HAS_CUDA, REPORTS
from tests.sweep import hostile

KIND, HANG_S = ("cuda", 25.0) if HAS_CUDA else ("cpu", 4.0)
PATIENCE_S = 240.0
"""What everything but the candidate that hangs may take, on a machine with other work: nothing reaches it."""
SITE = Site.parse("prefill_attention/c128a/h64")
METADATA = Site.parse("indexer_metadata/c4a")
SHAPES = [Shape(1, 4, 2048), Shape(1, 16, 2048), Shape(2, 24, 6000), Shape(1, 48, 4096)]
POINTS = [
    *(Point(SITE, shape) for shape in SHAPES),
    Point(METADATA, Shape(1, 16, 4000)),
    *(Point(SITE, Shape(1, tokens, 3000), Role.HELD_OUT) for tokens in (8, 40)),
]
DEADLY = ("raises", "aborts", "illegal_access", "hangs", "works_once")
FROM_OUTSIDE = ("killed",)
HARMLESS = ("out_of_memory", "wrong", "unwritten_row", "flaky")
OUTCOMES = {
    "raises": Outcome.RUNTIME_ERROR,
    "aborts": Outcome.CRASH,
    "illegal_access": Outcome.RUNTIME_ERROR if HAS_CUDA else Outcome.CRASH,
    "killed": Outcome.DISTURBED,
    "hangs": Outcome.TIMEOUT,
    "works_once": Outcome.RUNTIME_ERROR,
    "out_of_memory": Outcome.NO_MEMORY,
    "wrong": Outcome.WRONG_RESULT,
    "unwritten_row": Outcome.WRONG_RESULT,
    "flaky": Outcome.WRONG_RESULT,
    "noisy": Outcome.OK,
    "slow_first_call": Outcome.OK,
}
LAST_WORDS = {
    "raises": "RuntimeError: the launch was refused",
    "aborts": "exit code -6: terminate called: an invariant of the kernel does not hold",
    "illegal_access": "CUDA error" if HAS_CUDA else "exit code -11",
    "killed": "exit code -9",
    "hangs": f"no answer within {HANG_S:.0f} s",
    "works_once": "RuntimeError: works once",
    "out_of_memory": "OutOfMemoryError" if HAS_CUDA else "can't allocate memory",
    "wrong": "relative error 1.00e-01 exceeds 1e-02",
    "unwritten_row": "output has unwritten or non-finite values, the first in row 3 of 4",
    "flaky": "right before it was timed, then: relative error",
}


@dataclass(frozen=True, slots=True)
class Swept:
    """A sweep over the hostile candidates, finished; the one that hangs had a sweep of its own, with less patience."""

    environment: Environment
    report: Report
    rows: tuple[Measurement, ...]
    again: Report
    hung: Report

    def of(self, candidate: str) -> list[Measurement]:
        return [row for row in self.rows if row.candidate == candidate and row.site == SITE]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Swept:
    folder = tmp_path_factory.mktemp("hostile")
    quick = Added("tests.sweep.hostile", tuple(kind for kind in hostile.KINDS if kind != "hangs"))
    with Database.open(folder / "a.db") as database, Sweep(KIND, timeout_s=PATIENCE_S, added=quick) as sweep:
        environment = sweep.environment
        report, again = sweep.run(database, POINTS), sweep.run(database, POINTS)
        rows = list(database.measurements(environment.id))
    hanging = Added("tests.sweep.hostile", ("hangs",))
    with Database.open(folder / "b.db") as database, Sweep(KIND, timeout_s=HANG_S, added=hanging) as sweep:
        hung = sweep.run(database, [point for point in POINTS if point.site == SITE])
        rows += (row for row in database.measurements(environment.id) if row.candidate == "hangs")
    done = Swept(environment, report, tuple(rows), again, hung)
    request.config.stash[REPORTS]["hostile candidates in a sweep"] = _summary(done)
    return done


def _summary(done: Swept) -> list[str]:
    lines = [f"{done.report.points} points on {KIND}, {done.report.restarts} workers replaced"]
    for kind in hostile.KINDS:
        first = next(row for row in done.of(kind) if row.shape == SHAPES[0])
        said = first.detail or f"{first.latency_us:.1f} us [{first.ci_low_us:.1f}, {first.ci_high_us:.1f}]"
        lines.append(f"{kind:16} {first.outcome:14} {said}")
    return lines


def test_every_kind_is_in_the_sweep_and_has_an_expected_outcome() -> None:
    assert set(OUTCOMES) == set(hostile.KINDS)
    assert {*DEADLY, *FROM_OUTSIDE, *HARMLESS, "noisy", "slow_first_call"} == set(hostile.KINDS)


def test_the_sweep_reaches_its_end_and_leaves_the_next_only_what_was_disturbed(swept: Swept) -> None:
    assert (swept.report.points, swept.report.left) == (len(POINTS), 0)
    disturbed = sum(point.site == SITE for point in POINTS)
    assert (swept.again.points, swept.again.already_done) == (disturbed, len(POINTS) - disturbed)
    assert swept.report.disturbed == swept.again.disturbed == disturbed


@pytest.mark.parametrize("candidate", names_at(SITE))
def test_the_projects_own_candidates_are_measured_in_full_at_every_point(swept: Swept, candidate: str) -> None:
    for point in POINTS:
        if point.site != SITE:
            continue
        rows = [row for row in swept.of(candidate) if row.shape == point.shape]
        assert {row.outcome for row in rows} == {Outcome.OK}
        assert {row.part for row in rows} >= {stage.name for stage in stages(SITE, candidate)}


def test_the_other_site_is_measured_although_workers_died_before_it(swept: Swept) -> None:
    rows = [row for row in swept.rows if row.site == METADATA]
    assert {row.candidate for row in rows if row.outcome is Outcome.OK} >= {"jit"}


@pytest.mark.parametrize("kind", [*DEADLY, *FROM_OUTSIDE, *HARMLESS])
def test_a_broken_candidate_costs_its_own_rows_which_keep_its_last_words(swept: Swept, kind: str) -> None:
    first = [row for row in swept.of(kind) if row.shape == SHAPES[0]]
    assert {row.outcome for row in first} == {OUTCOMES[kind]}
    assert all(LAST_WORDS[kind] in row.detail for row in first), [row.detail for row in first]
    assert all("\n" not in row.detail for row in first)
    assert not any(row.outcome is Outcome.OK for row in swept.of(kind))


@pytest.mark.parametrize("kind", DEADLY)
def test_a_candidate_that_failed_twice_is_given_up_and_the_report_says_so(swept: Swept, kind: str) -> None:
    (given_up,) = [entry for entry in (*swept.report.given_up, *swept.hung.given_up) if entry.candidate == kind]
    assert (given_up.site, given_up.failures) == (SITE.key, 2)
    assert given_up.num_qo_tokens == 4
    assert LAST_WORDS[kind] in given_up.reason
    not_tried = [row for row in swept.of(kind) if row.outcome is Outcome.UNSUPPORTED]
    assert {row.shape for row in not_tried} == {point.shape for point in POINTS if point.site == SITE} - {*SHAPES[:2]}
    assert all(row.detail == given_up.reason for row in not_tried)


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_costs_no_worker_is_tried_everywhere(swept: Swept, kind: str) -> None:
    assert {row.shape for row in swept.of(kind)} == {point.shape for point in POINTS if point.site == SITE}
    assert {row.outcome for row in swept.of(kind)} == {OUTCOMES[kind]}


def test_as_many_workers_are_replaced_as_died(swept: Swept) -> None:
    # Two points each, and a worker's end is tried once more; so is what ran out of memory, while that helps.
    mortal = sum(OUTCOMES[kind] is Outcome.CRASH for kind in DEADLY)
    mortal += HAS_CUDA  # the illegal access takes the context with it
    assert 4 * mortal <= swept.report.restarts <= 4 * mortal + 4 + 3
    assert swept.hung.restarts >= 2  # more only on a machine too busy for an honest candidate in that time


def test_a_noisy_candidate_says_that_its_median_is_not_known_well(swept: Swept) -> None:
    noisy = [row for row in swept.of("noisy") if row.part in ("attention", "per_layer")]
    assert noisy
    assert {row.stopped_by for row in noisy} == {Stop.BUDGET}
    for row in noisy:
        assert row.latency_us is not None
        assert row.ci_high_us is not None
        assert row.ci_low_us is not None
        assert (row.ci_high_us - row.ci_low_us) / row.latency_us > 0.02


def test_a_slow_first_call_is_seen_at_every_new_shape(swept: Swept) -> None:
    by_tokens: dict[int, float] = {}
    for row in swept.of("slow_first_call"):
        tokens = row.shape.num_qo_tokens
        by_tokens[tokens] = max(by_tokens.get(tokens, 0.0), row.first_call_s or 0.0)
    assert len(by_tokens) == len({point.shape.num_qo_tokens for point in POINTS if point.site == SITE})
    assert min(by_tokens.values()) >= hostile.FIRST_CALL_S
    honest = [row.first_call_s or 0.0 for row in swept.of("with_kvcache")]
    assert sorted(honest)[len(honest) // 2] < hostile.FIRST_CALL_S / 2


def fitted(swept: Swept, kind: str, speedup: float = 1.0) -> Policy | None:
    """The policy if the hostile candidate stood in the place of ``with_kvcache`` and was faster by ``speedup``."""

    def disguised(row: Measurement) -> Measurement:
        row = replace(row, candidate="with_kvcache")
        if row.latency_us is None or row.ci_low_us is None or row.ci_high_us is None:
            return row
        times = [us / speedup for us in (row.latency_us, row.ci_low_us, row.ci_high_us)]
        return replace(row, latency_us=times[0], ci_low_us=times[1], ci_high_us=times[2], samples_us=())

    own = swept.of("sparse_fwd")
    theirs = [disguised(row) for row in swept.of(kind)]
    source = Source(file="db/x.jsonl", sha256="0" * 64, measurements=len(own) + len(theirs), command="mla-tune fit")
    try:
        return fit_policy(swept.environment, [*own, *theirs], source=source).policy
    except FitError:
        return None


@pytest.mark.parametrize("kind", [kind for kind in hostile.KINDS if kind != "slow_first_call"])
def test_no_hostile_candidate_is_ever_chosen(swept: Swept, kind: str) -> None:
    policy = fitted(swept, kind)
    assert policy is not None
    for table in policy.tables:
        assert table.incumbent == "sparse_fwd"
        assert {choice.candidate for row in table.rows for choice in row.choices} == {"sparse_fwd"}


def test_a_slow_first_call_bars_a_candidate_however_fast_it_is_afterwards(swept: Swept) -> None:
    policy = fitted(swept, "slow_first_call", speedup=10.0)
    assert policy is not None
    for table in policy.tables:
        (barred,) = table.ineligible
        assert barred.candidate == "with_kvcache"
        assert barred.first_call_s >= hostile.FIRST_CALL_S
        assert {choice.candidate for row in table.rows for choice in row.choices} == {"sparse_fwd"}


def test_an_honest_candidate_that_much_faster_would_have_been_chosen(swept: Swept) -> None:
    policy = fitted(swept, "with_kvcache", speedup=10.0)
    assert policy is not None
    assert any(
        choice.candidate == "with_kvcache" for table in policy.tables for row in table.rows for choice in row.choices
    )
    assert Observations(swept.rows).candidates(SITE) == names_at(SITE)
