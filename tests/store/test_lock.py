"""One sweep at a time on a database, whatever becomes of the lock's file in between."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from mla_tune.errors import StoreError
from mla_tune.store.lock import sweep_lock

flock = fcntl.flock


def lock_of(database: Path) -> Path:
    return database.with_name(f"{database.name}.lock")


def test_a_second_sweep_is_refused_with_the_first_ones_process_and_may_start_after_it(tmp_path: Path) -> None:
    with sweep_lock(tmp_path / "a.db"):
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()};"), sweep_lock(tmp_path / "a.db"):
            pass
        with sweep_lock(tmp_path / "b.db"):
            pass
    with sweep_lock(tmp_path / "a.db"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_on_a_file_that_its_last_holder_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """We open the file, its holder removes it and ends, and only then do we lock it: what we hold has no name any more."""
    database = tmp_path / "a.db"
    taken: list[int] = []

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            lock_of(database).unlink()
        taken.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with sweep_lock(database):
        assert len(taken) == 2
        with pytest.raises(StoreError, match="one sweep at a time"), sweep_lock(database):
            pass


def test_a_lock_on_a_file_that_another_sweep_made_anew_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, and a third sweep has made and locked a new file before we lock the old one."""
    database = tmp_path / "a.db"
    others: list[int] = []

    def late(descriptor: int, operation: int) -> None:
        if not others:
            lock_of(database).unlink()
            others.append(os.open(lock_of(database), os.O_RDWR | os.O_CREAT))
            flock(others[0], operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StoreError, match="one sweep at a time"), sweep_lock(database):
        pass
    os.close(others[0])


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line_with_a_way_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match="name another with --db") as caught, sweep_lock(tmp_path / "a.db"):
        pass
    assert os.strerror(number) in str(caught.value)
    assert "\n" not in str(caught.value)


def _count(database: Path, counter: Path, times: int) -> None:
    while times:
        try:
            with sweep_lock(database):
                counter.write_text(str(int(counter.read_text()) + 1))
                times -= 1
        except StoreError:
            continue


def test_processes_that_take_turns_never_hold_it_together(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(tmp_path / "a.db", counter, 100)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert counter.read_text() == "400"
