"""The search for launch parameters, in a real SQLite file beside measurements; nothing is launched."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mla_tune.errors import StoreError
from mla_tune.sites.launch_parameters import KERNELS, parameters
from mla_tune.store.database import Database
from mla_tune.sweep.tuning.space import default_values, launch_at, space_of, space_size
from mla_tune.sweep.tuning.study import CLEARLY_WORSE, Search, open_search, study_storage
from mla_tune.sweep.tuning.tuner import targets
from tests.store.strategies import ENVIRONMENT, fixed_tuned, timing

KERNEL = "slot_ids"


def database(path: Path) -> Path:
    with Database.open(path) as opened:
        opened.record(ENVIRONMENT, [timing()])
    return path


def opened_search(storage: object, seed: int = 0, kernel: str = KERNEL) -> Search:
    return open_search(storage, ENVIRONMENT.id, kernel, 0, seed)  # type: ignore[arg-type]


def cost(values: dict[str, int]) -> float:
    """A law with one best point."""
    return 0.8 + abs(values["rows_per_program"] - 256) / 1000 + values["num_warps"] / 100


def run(search: Search, most: int) -> list[dict[str, int]]:
    asked_for: list[dict[str, int]] = []
    while len(asked_for) < most and (asked := search.ask()) is not None:
        values = parameters(asked.launch.config)
        asked_for.append(values)
        if not search.prune(asked, cost(values)):
            search.finish(asked, cost(values))
    return asked_for


def test_a_search_begins_with_the_default_tries_everything_once_and_ends(tmp_path: Path) -> None:
    with study_storage(database(tmp_path / "a.db")) as storage:
        search = opened_search(storage)
        asked_for = run(search, 1000)
        assert asked_for[0] == default_values(KERNEL, 0)
        assert len(asked_for) == len({tuple(values.items()) for values in asked_for}) == space_size(KERNEL, 0)
        assert search.ask() is None
        assert parameters(search.best(1)[0].config) == {"rows_per_program": 256, "num_warps": 1}


def test_what_is_clearly_worse_after_a_few_samples_is_pruned_and_never_asked_again(tmp_path: Path) -> None:
    with study_storage(database(tmp_path / "a.db")) as storage:
        search = opened_search(storage)
        run(search, 1000)
        states = {trial.state.name for trial in search.tried.values()}
        assert states == {"COMPLETE", "PRUNED"}
        best = min(trial.value for trial in search.tried.values() if trial.value is not None)
        for trial in search.tried.values():
            if trial.state.name == "PRUNED":
                assert cost(trial.params) > CLEARLY_WORSE * best


def test_the_same_seed_asks_for_the_same_and_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    asked_for = []
    for name in ("a.db", "b.db"):
        with study_storage(database(tmp_path / name)) as storage:
            asked_for.append(run(opened_search(storage, seed=3), 5))
        with study_storage(tmp_path / name) as storage:
            search = opened_search(storage, seed=3)
            assert len(search.tried) == 5
            asked_for[-1] += run(search, 6)
    assert asked_for[0] == asked_for[1]
    assert len({tuple(values.items()) for values in asked_for[0]}) == 11


def test_studies_and_measurements_share_a_file_and_both_stay_readable(tmp_path: Path) -> None:
    path = database(tmp_path / "odd ?name#1 {x}.db")
    with Database.open(path) as opened, study_storage(path) as storage:
        search = opened_search(storage)
        for _ in range(3):
            run(search, 1)
            opened.record(ENVIRONMENT, [timing(part="combine")])
            opened.record_tuned(ENVIRONMENT, fixed_tuned())
        assert len(opened.measurements(ENVIRONMENT.id)) == 2
    assert sorted(os.listdir(tmp_path)) == [path.name]
    with Database.open(path, create=False) as opened:
        assert opened.tuned(ENVIRONMENT.id) == fixed_tuned()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)


def test_kernels_and_classes_and_environments_have_searches_of_their_own(tmp_path: Path) -> None:
    with study_storage(database(tmp_path / "a.db")) as storage:
        run(opened_search(storage), 2)
        assert len(opened_search(storage).tried) == 2
        assert not open_search(storage, ENVIRONMENT.id, KERNEL, 131072, 0).tried
        assert not open_search(storage, "0123456789abcdef", KERNEL, 0, 0).tried
        assert not opened_search(storage, kernel="combine_topk").tried


_KILLED = """
import sys
from pathlib import Path
from tests.sweep.test_study import opened_search, run
from mla_tune.sweep.tuning.study import study_storage
with study_storage(Path(sys.argv[1])) as storage:
    search = opened_search(storage)
    run(search, 4)
    search.ask()
    print("asked", flush=True)
    while True:
        run(search, 1)
        print("told", flush=True)
"""


@pytest.mark.parametrize("after", ["asked", "told"])
def test_a_killed_process_leaves_its_finished_trials_and_nothing_that_is_in_the_way(tmp_path: Path, after: str) -> None:
    path = database(tmp_path / "a.db")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() not in (after, ""):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with study_storage(path) as storage:
        search = opened_search(storage)
        assert 4 <= len(search.tried) < space_size(KERNEL, 0)
        assert {trial.state.name for trial in search.tried.values()} <= {"COMPLETE", "PRUNED"}
        run(search, 1000)
        assert len(search.tried) == space_size(KERNEL, 0)
    with Database.open(path, create=False) as opened:
        assert opened.measurements(ENVIRONMENT.id) == [timing()]


def test_a_failed_configuration_is_remembered_with_its_reason(tmp_path: Path) -> None:
    path = database(tmp_path / "a.db")
    with study_storage(path) as storage:
        search = opened_search(storage)
        asked = search.ask()
        assert asked is not None
        search.fail(asked, "crash: worker ended")
    with study_storage(path) as storage:
        again = opened_search(storage)
        assert [trial.user_attrs["reason"] for trial in again.tried.values()] == ["crash: worker ended"]
        assert asked.launch not in again.untried.values()


def test_a_locked_database_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = database(tmp_path / "a.db")
    monkeypatch.setattr("mla_tune.sweep.tuning.study._BUSY_TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("begin immediate")
        with pytest.raises(StoreError, match="one writer at a time") as error, study_storage(path):
            pass
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kernel", "found"), targets(), ids=lambda value: getattr(value, "name", None))
def test_the_default_lies_in_the_space_of_its_class_and_every_point_is_a_launch(kernel: object, found: object) -> None:
    name, size_from = kernel.name, found.size_from  # type: ignore[attr-defined]
    space, default = space_of(name, size_from), default_values(name, size_from)
    assert set(space) == set(default)
    assert all(default[key] in values for key, values in space.items())
    assert launch_at(name, size_from, default) is not None
    assert 20 <= space_size(name, size_from) <= 400


def test_workspace_rows_are_streamed_in_the_largest_class_alone() -> None:
    for name in ("dequantize_v4", "dequantize_dsa"):
        *others, largest = KERNELS[name].classes
        assert all(space_of(name, found.size_from)["stream_stores"] == (0,) for found in others)
        assert space_of(name, largest.size_from)["stream_stores"] == (0, 1)
