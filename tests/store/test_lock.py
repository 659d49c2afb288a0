"""The lock of a database has one holder, whatever becomes of its file."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from mla_tune.errors import StoreError
from mla_tune.store.lock import sweep_lock


def test_a_second_holder_is_refused_and_the_lock_is_free_afterwards(tmp_path: Path) -> None:
    database = tmp_path / "a.db"
    for _ in range(2):
        with sweep_lock(database), pytest.raises(StoreError, match="one sweep at a time"), sweep_lock(database):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_last_holder_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder ends between another's opening of the file and its lock: what that one locks then is nobody's file."""
    database, lock = tmp_path / "a.db", fcntl.flock
    removals = [tmp_path / "a.db.lock"]

    def removed_before(descriptor: int, operation: int) -> None:
        while removals:
            removals.pop().unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with sweep_lock(database):
        assert (tmp_path / "a.db.lock").exists()
        with pytest.raises(StoreError, match="one sweep at a time"), sweep_lock(database):
            pass
