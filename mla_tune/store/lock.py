"""One sweep at a time on a database: two would measure everything twice, and disturb each other's timings."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mla_tune.errors import StoreError


@contextmanager
def sweep_lock(database: Path) -> Iterator[None]:
    """Hold the lock of the database at this path. Raises :class:`StoreError` if another process has it.

    The lock lives in a file beside the database and belongs to the open file: however its holder ends, it is free. The
    file is removed by a holder that ends in order; one that was killed leaves it behind, unlocked.
    """
    path = database.with_name(f"{database.name}.lock")
    descriptor = _acquire(path, database)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is still locked, see _acquire
        os.close(descriptor)


def _acquire(path: Path, database: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"a sweep must be able to lock its database: cannot write {path}: {error.strerror}; name another with --db"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StoreError(
                    f"a database takes one sweep at a time: {database} is in use by process {holder}; "
                    "wait until it ends, or name another database with --db"
                ) from None
            raise StoreError(
                f"a sweep must be able to lock its database: {path}: {error.strerror}; name another with --db, on a file "
                "system that has locks"
            ) from None
        if _is_there(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder removed it between our two calls: what we locked is nobody's any more


def _is_there(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False
