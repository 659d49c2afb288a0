"""A sweep with real worker processes on the CPU: it goes on where it was, and no way to end loses what is stored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.database import Database
from mla_tune.store.measurement import Outcome, Role
from mla_tune.sweep.grid import Point
from mla_tune.sweep.preset import FULL, QUICK
from mla_tune.sweep.runner import Progress, Sweep
from tests.command import ENVIRONMENT, is_running, wait_until_gone
from tests.conftest import HAS_CUDA

METADATA = Site.parse("indexer_metadata/c4a")
ATTENTION = Site.parse("prefill_attention/c128a/h64")
POINTS = [
    Point(ATTENTION, Shape(1, 2, 300)),
    Point(METADATA, Shape(1, 4, 400), Role.HELD_OUT),
    Point(METADATA, Shape(2, 16, 4000)),
    Point(METADATA, Shape(1, 32, 8000)),
]


@pytest.fixture(scope="module")
def sweep() -> Iterator[Sweep]:
    with Sweep("cpu", timeout_s=60) as running:
        yield running


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(tmp_path / "a.db") as opened:
        yield opened


def points_of(database: Database, environment: str) -> set[tuple[Site, Shape]]:
    return {(row.site, row.shape) for row in database.measurements(environment)}


def test_a_second_run_measures_only_what_is_missing(sweep: Sweep, database: Database) -> None:
    first = sweep.run(database, POINTS[:2])
    assert (first.points, first.already_done, first.left, first.failed) == (2, 0, 0, 0)
    stored = database.measurements(first.environment.id)
    second = sweep.run(database, POINTS[:3])
    assert (second.points, second.already_done, second.left) == (1, 2, 0)
    kept = [row for row in database.measurements(first.environment.id) if row.shape != POINTS[2].shape]
    assert kept == stored


def test_what_a_sweep_goes_without_is_measured_by_the_next_that_does_not(sweep: Sweep, database: Database) -> None:
    def candidates() -> set[str]:
        return {row.candidate for row in database.measurements(sweep.environment.id)}

    everything = {name for point in POINTS for name in names_at(point.site)}
    sweep.run(database, POINTS, without=QUICK.without)
    assert candidates() == everything - {"sparse_fwd_fused", "sparse_fwd_selected"} != everything
    assert FULL.without == ()
    sweep.run(database, POINTS, without=FULL.without)
    assert candidates() == everything


def test_every_part_of_every_candidate_is_stored_with_its_role(sweep: Sweep, database: Database) -> None:
    sweep.run(database, POINTS[:2])
    rows = database.measurements(sweep.environment.id)
    assert {row.shape: row.role for row in rows} == {point.shape: point.role for point in POINTS[:2]}
    for point in POINTS[:2]:
        for name in names_at(point.site):
            timed = {row.part for row in rows if (row.shape, row.candidate) == (point.shape, name)}
            assert timed >= {stage.name for stage in stages(point.site, name)}
            assert timed & {"per_layer", "per_forward"}


def test_a_budget_stops_after_the_point_under_way_and_says_what_is_left(sweep: Sweep, database: Database) -> None:
    report = sweep.run(database, POINTS, budget_s=0.2, on_progress=lambda _: time.sleep(0.25))
    assert (report.points, report.left) == (1, 3)
    assert points_of(database, report.environment.id) == {(POINTS[0].site, POINTS[0].shape)}
    rest = sweep.run(database, POINTS)
    assert (rest.points, rest.already_done, rest.left) == (3, 1, 0)


def test_progress_names_each_point_and_then_the_end(sweep: Sweep, database: Database) -> None:
    seen: list[Progress] = []
    sweep.run(database, POINTS, on_progress=seen.append)
    assert [progress.point for progress in seen] == [*POINTS, None]
    assert [progress.done for progress in seen] == [0, 1, 2, 3, 4]


def test_a_check_stores_nothing_and_gives_one_verdict_a_candidate(sweep: Sweep) -> None:
    verdicts = list(sweep.check(POINTS[:2]))
    expected = Counter((point.site, name) for point in POINTS[:2] for name in names_at(point.site))
    assert Counter((row.site, row.candidate) for row in verdicts) == expected
    assert {row.outcome for row in verdicts} == {Outcome.OK}


def test_a_worker_killed_at_work_costs_at_most_the_point_that_it_was_at(database: Database) -> None:
    points = [POINTS[2], Point(ATTENTION, Shape(1, 96, 32768)), POINTS[3]]  # the second takes about a second
    with Sweep("cpu") as sweep:
        doomed = sweep.worker_pid
        assert doomed is not None

        def strike(progress: Progress) -> None:
            if progress.done == 1 and sweep.worker_pid == doomed:
                threading.Timer(0.1, os.kill, (doomed, signal.SIGKILL)).start()

        report = sweep.run(database, points, on_progress=strike)
        wait_until_gone(doomed)
    assert (report.points, report.restarts >= 1) == (len(points), True)
    rows = database.measurements(report.environment.id)
    assert {(row.site, row.shape) for row in rows} == {(point.site, point.shape) for point in points}
    assert {row.outcome for row in rows} <= {Outcome.OK, Outcome.CRASH}
    crashed = [row for row in rows if row.outcome is Outcome.CRASH]
    assert len({row.shape for row in crashed}) <= 1
    assert all(row.detail.startswith("worker ended with exit code -9") for row in crashed)


def test_a_worker_that_died_idle_is_replaced_and_nobody_is_blamed(database: Database) -> None:
    with Sweep("cpu") as sweep:
        first = sweep.worker_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until_gone(first)
        report = sweep.run(database, POINTS[1:3])
        last = sweep.worker_pid
        assert (report.points, report.failed, report.restarts) == (2, 0, 1)
    assert last is not None
    assert not is_running(last)


@pytest.mark.skipif(HAS_CUDA, reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused_in_one_line_and_no_process_stays() -> None:
    before = children()
    with pytest.raises(EnvironmentMismatchError, match="--gpu cpu") as caught:
        Sweep("cuda")
    assert "\n" not in str(caught.value)
    assert children() == before


def children() -> set[str]:
    """Worker processes of this one."""
    lines = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return {line for line in lines.stdout.splitlines() if "spawn_main" in line}


ENDLESS = """
import sys
from pathlib import Path
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import Site
from mla_tune.store.database import Database
from mla_tune.sweep.grid import Point
from mla_tune.sweep.runner import Sweep

if __name__ == "__main__":
    site = Site.parse("indexer_metadata/c4a")
    points = [Point(site, Shape(1, tokens, 1 << 20)) for tokens in range(1, 10000)]
    with Sweep("cpu") as sweep, Database.open(sys.argv[1]) as database:
        print(sweep.worker_pid, sweep.environment.id, flush=True)
        sweep.run(database, points, on_progress=lambda progress: print(progress.done, flush=True))
"""


def test_a_killed_sweep_leaves_no_worker_and_every_finished_point(tmp_path: Path) -> None:
    script, path = tmp_path / "endless.py", tmp_path / "a.db"
    script.write_text(ENDLESS)
    process = subprocess.Popen([sys.executable, script, path], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    worker, environment = process.stdout.readline().split()
    for line in process.stdout:
        if int(line) == 3:
            break
    assert is_running(int(worker))
    process.kill()
    process.communicate()
    wait_until_gone(int(worker))
    with Database.open(path, create=False) as database:
        stored = sorted(shape.num_qo_tokens for _, shape in points_of(database, environment))
    assert stored[:3] == [1, 2, 3]
    assert stored == list(range(1, len(stored) + 1))
