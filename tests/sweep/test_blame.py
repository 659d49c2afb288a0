"""Whatever its workers die of, a sweep ends with one verdict for every candidate, and the innocent are measured.

The worker is scripted here, so that every way to fail comes up; real processes are killed in ``test_runner.py``.
"""

from __future__ import annotations

import tempfile
from collections import deque
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.sites.candidates import names_at
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.database import Database
from mla_tune.store.measurement import PER_LAYER_TOTAL, Measurement, Outcome, Regime
from mla_tune.sweep import runner
from mla_tune.sweep.grid import Point
from mla_tune.sweep.runner import Report, Sweep
from mla_tune.sweep.worker.messages import TIMING, Done, Entering, Hello, Lost, Message, Task
from tests.store.strategies import CPU_ENVIRONMENT

SITE = Site.parse("prefill_attention/c4a/h64/k512")


class Behaviour(StrEnum):
    FINE = "fine"
    CRASH = "crash"
    HANG = "hang"
    LOSE_DEVICE = "lose_device"
    CRASH_WHEN_TIMED = "crash_when_timed"
    HANG_WHEN_TIMED = "hang_when_timed"
    LOSE_DEVICE_WHEN_TIMED = "lose_device_when_timed"


OUTCOME = {
    Behaviour.FINE: Outcome.OK,
    Behaviour.CRASH: Outcome.CRASH,
    Behaviour.HANG: Outcome.TIMEOUT,
    Behaviour.LOSE_DEVICE: Outcome.RUNTIME_ERROR,
    Behaviour.CRASH_WHEN_TIMED: Outcome.CRASH,
    Behaviour.HANG_WHEN_TIMED: Outcome.TIMEOUT,
    Behaviour.LOSE_DEVICE_WHEN_TIMED: Outcome.RUNTIME_ERROR,
}
_DIES, _HANGS = "dies", "hangs"


def timing(point: Point, name: str) -> Measurement:
    return Measurement(
        point.site,
        point.shape,
        point.role,
        name,
        PER_LAYER_TOTAL,
        Regime.EAGER,
        Outcome.OK,
        latency_us=1.0,
        num_samples=1,
        samples_us=(1.0,),
    )


class ScriptedWorker:
    """A worker whose candidates behave as told; it refuses to be used after it ended."""

    behaviours: dict[str, Behaviour]
    started: int

    def __init__(self, kind: str, added: str) -> None:
        assert (kind, added) == ("cpu", "")
        type(self).started += 1
        self.hello = Hello(CPU_ENVIRONMENT, (Regime.EAGER,))
        self.pid = None
        self._ended = False
        self._answers: deque[Message | str] = deque()

    def send(self, task: Task) -> None:
        assert not self._ended
        assert not self._answers
        self._answers.extend(self._script(task))

    def _script(self, task: Task) -> list[Message | str]:
        script: list[Message | str] = []
        for suffix, announced in (("", task.candidates), ("_when_timed", (TIMING,))):
            for word in announced:
                script.append(Entering(word))
                for name in [word] if word else task.candidates:
                    ending = self.behaviours[name]
                    if ending == f"crash{suffix}":
                        return [*script, _DIES]
                    if ending == f"hang{suffix}":
                        return [*script, _HANGS]
                    if ending == f"lose_device{suffix}":
                        return [*script, Lost((), "CUDA error: an illegal memory access")]
        return [*script, Done(tuple(timing(task.point, name) for name in task.candidates))]

    def receive(self, timeout_s: float) -> Message | None:
        answer = self._answers.popleft()
        if isinstance(answer, str):
            self._ended = True
            if answer == _DIES:
                raise EOFError
            return None
        self._ended = isinstance(answer, Lost)
        return answer

    def support(self, pairs: tuple[tuple[Site, str], ...], timeout_s: float) -> tuple[str | None, ...]:
        return (None,) * len(pairs)

    def exit_summary(self) -> str:
        return "worker ended with exit code -11"

    def stop(self) -> None:
        self._ended = True


def swept(behaviours: tuple[Behaviour, ...], tokens: list[int]) -> tuple[list[Measurement], int]:
    """What the database holds after a sweep over points of so many query tokens, and how many workers it took."""
    ScriptedWorker.behaviours = dict(zip(names_at(SITE), behaviours, strict=True))
    ScriptedWorker.started = 0
    points = [Point(SITE, Shape(1, count, 1 << 20)) for count in tokens]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "WorkerProcess", ScriptedWorker)
        with Database.open(Path(folder) / "a.db") as database, Sweep("cpu") as sweep:
            report = sweep.run(database, points)
            assert (report.points, report.left, report.already_done) == (len(points), 0, 0)
            assert report.restarts == ScriptedWorker.started - 1
            rows = database.measurements(CPU_ENVIRONMENT.id)
            assert report.failed == sum(row.outcome is not Outcome.OK for row in rows)
            again = sweep.run(database, points)
            assert (again.points, again.already_done) == (0, len(points))
    return rows, ScriptedWorker.started


@settings(max_examples=60)
@given(st.tuples(*[st.sampled_from(Behaviour)] * len(names_at(SITE))))
def test_each_candidate_gets_its_own_verdict(behaviours: tuple[Behaviour, ...]) -> None:
    rows, started = swept(behaviours, [64])
    found = [(row.candidate, row.outcome) for row in rows]
    assert found == [(c, OUTCOME[b]) for c, b in zip(names_at(SITE), behaviours, strict=True)]
    # The first, one after all failed together, and two for each: a worker's end is tried once more before it is believed.
    assert started <= 2 + 2 * len(names_at(SITE))
    for row in rows:
        assert (
            row.detail
            == {
                Outcome.OK: "",
                Outcome.CRASH: "worker ended with exit code -11",
                Outcome.TIMEOUT: "no answer within 300 s",
                Outcome.RUNTIME_ERROR: "CUDA error: an illegal memory access",
            }[row.outcome]
        )


@settings(max_examples=20)
@given(
    st.sampled_from(sorted(set(Behaviour) - {Behaviour.FINE})),
    st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True),
)
def test_a_candidate_that_always_fails_costs_few_workers_and_its_points_say_that_it_was_not_tried(
    behaviour: Behaviour, tokens: list[int]
) -> None:
    rows, _ = swept((behaviour, *[Behaviour.FINE] * (len(names_at(SITE)) - 1)), tokens)
    outcomes = {(row.candidate, row.shape.num_qo_tokens): row.outcome for row in rows}
    assert len(outcomes) == len(rows) == len(names_at(SITE)) * len(tokens)
    tried: list[int] = []
    for count in tokens:
        assert outcomes["with_kvcache", count] is Outcome.OK
        skipped = len(tried) >= 2 and count >= min(tried)
        assert outcomes["sparse_fwd", count] is (Outcome.UNSUPPORTED if skipped else OUTCOME[behaviour])
        if not skipped:
            tried.append(count)


class StruckWorker(ScriptedWorker):
    """A worker that is ended in the ways told, one after the other, while ``sparse_fwd`` runs; then all goes well."""

    ends: list[str]

    def __init__(self, kind: str, added: str) -> None:
        super().__init__(kind, added)
        self._said = ""

    def _script(self, task: Task) -> list[Message | str]:
        script = super()._script(task)
        if self.ends and "sparse_fwd" in task.candidates:
            self._said = self.ends.pop(0)
            return [*script[: script.index(Entering("sparse_fwd")) + 1], _DIES]
        return script

    def exit_summary(self) -> str:
        return self._said


def struck(ends: list[str], counts: list[int]) -> tuple[list[Measurement], Report, list[Task]]:
    """Rows of a sweep whose workers end so while they run ``sparse_fwd``, its report, and what the next would repeat."""
    StruckWorker.behaviours = dict.fromkeys(names_at(SITE), Behaviour.FINE)
    StruckWorker.started, StruckWorker.ends = 0, list(ends)
    points = [Point(SITE, Shape(1, count, 1 << 20)) for count in counts]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "WorkerProcess", StruckWorker)
        with Database.open(Path(folder) / "a.db") as database, Sweep("cpu") as sweep:
            report = sweep.run(database, points)
            rows = database.measurements(CPU_ENVIRONMENT.id)
            return rows, report, runner.missing_tasks(database, CPU_ENVIRONMENT, points)


OUTSIDE = [
    "worker ended with exit code -9",
    "worker ended with exit code -15: partial output",
    "worker ended with exit code 255",
    "worker ended with exit code 1: OSError: [Errno 28] No space left on device",
    "worker ended with exit code 1: NVMLError_Unknown: Unknown Error",
    "worker ended with exit code -6: CUDA error: uncorrectable ECC error encountered",
    "worker ended with exit code -6: what(): std::bad_alloc",
]


@pytest.mark.parametrize("said", [*OUTSIDE, "worker ended with exit code -11"])
def test_a_worker_that_ended_once_costs_nobody_a_row(said: str) -> None:
    rows, report, again = struck([said], [64, 128])
    assert {row.outcome for row in rows} == {Outcome.OK}
    assert report.recovered == (
        f"{said_candidates(report)} at {SITE.key}, 64 query tokens ran in a fresh process after: {said}",
    )
    assert (report.troubles, report.failed, report.given_up, again) == ((), 0, (), [])


def said_candidates(report: Report) -> str:
    return report.recovered[0].partition(" at ")[0]


@pytest.mark.parametrize("said", OUTSIDE)
def test_trouble_that_stays_is_reported_and_measured_again_and_never_a_failure_of_the_candidate(said: str) -> None:
    rows, report, again = struck([said] * 2, [64])
    assert {row.outcome for row in rows if row.candidate == "sparse_fwd"} == {Outcome.DISTURBED}
    assert {row.outcome for row in rows if row.candidate != "sparse_fwd"} == {Outcome.OK}
    assert report.troubles == (f"{said} (1 point)",)
    assert (report.disturbed, report.given_up) == (1, ())
    assert [(task.point.shape.num_qo_tokens, task.candidates) for task in again] == [(64, ("sparse_fwd",))]


def test_a_candidate_during_which_workers_are_ended_again_and_again_is_left_for_the_next_sweep() -> None:
    counts = [1 << n for n in range(4, 12)]
    rows, report, again = struck(["worker ended with exit code -9"] * 100, counts)
    assert {row.outcome for row in rows if row.candidate == "sparse_fwd"} == {Outcome.DISTURBED}
    assert report.restarts == 4  # two points, each tried twice
    assert [task.point.shape.num_qo_tokens for task in again] == counts


class UnsupportedWorker(ScriptedWorker):
    """A worker on a machine that can run nothing; being sent a task would mean that inputs are built."""

    def support(self, pairs: tuple[tuple[Site, str], ...], timeout_s: float) -> tuple[str | None, ...]:
        return ("this GPU is sm120",) * len(pairs)

    def _script(self, task: Task) -> list[Message | str]:
        raise AssertionError("inputs were built for what cannot run")


def test_what_cannot_run_here_is_a_row_with_its_reason_before_any_inputs_are_built(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, Database.open(tmp_path / "a.db") as database:
        UnsupportedWorker.started = 0
        patch.setattr(runner, "WorkerProcess", UnsupportedWorker)
        with Sweep("cpu") as sweep:
            report = sweep.run(database, [Point(SITE, Shape(1, 64, 8192))])
        rows = database.measurements(CPU_ENVIRONMENT.id)
    assert {(row.outcome, row.detail) for row in rows} == {(Outcome.UNSUPPORTED, "this GPU is sm120")}
    assert (report.restarts, report.points, len(rows)) == (0, 1, len(names_at(SITE)))
