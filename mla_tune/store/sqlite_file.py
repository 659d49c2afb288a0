"""Opening the SQLite file of a measurement database, and what its failures mean to a user."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import sqlite_utils

from mla_tune.errors import StoreError
from mla_tune.store.migrations import applied_migrations, known_migrations

_MEANING = {
    sqlite3.SQLITE_NOTADB: "must be a SQLite file that mla-tune wrote: {path} is not one; name another or a new file",
    sqlite3.SQLITE_CORRUPT: "must be intact: {path} is damaged ({error}); "
    "restore a copy, or import the committed export into a new file",
    sqlite3.SQLITE_FULL: "needs room to grow: {path}: {error}; free some and run again, what was committed is kept",
    sqlite3.SQLITE_IOERR: "must be readable and writable: {path}: {error}; "
    "check the disk and its quota and run again, what was committed is kept",
    sqlite3.SQLITE_READONLY: "must be writable: {path} is not; change its permissions or copy it elsewhere",
    sqlite3.SQLITE_CANTOPEN: "must be in an existing folder where files may be made: cannot open {path}; "
    "make the folder, change its permissions or name another",
}
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite and the file system raise into one-line :class:`StoreError`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:  # not from the database: a mistake in our own calls
            raise
        primary = code & 0xFF
        if primary in _BUSY:
            raise StoreError(_busy(path)) from error
        meaning = _MEANING.get(primary, "must be as mla-tune wrote it: {path}: {error}; restore a copy of it")
        raise StoreError("a measurement database " + meaning.format(path=path, error=error)) from error
    except OSError as error:
        raise StoreError(
            f"a measurement database must be a file that can be opened: {path}: {error.strerror}"
        ) from error


def connect(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    """Connect with the given URI parameters (``mode=rwc``, ``mode=rw`` or ``mode=ro``)."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", timeout=busy_timeout_s, uri=True)


def check_file(path: Path, *, create: bool) -> None:
    """Refuse what is not a measurement database of a known schema. Only reads: a refused file stays as it is."""
    if not path.exists():
        if create:
            return
        raise StoreError(f"a measurement database must exist to be read: no file {path}; make one with mla-tune sweep")
    if not path.is_file():
        raise StoreError(f"a measurement database must be a regular file: {path} is not; name a file, new or existing")
    log = Path(f"{path}-wal")
    # An ordinary read-only connection leaves -wal and -shm files behind; it is needed only where a log is to be read.
    logged = log.exists() and log.stat().st_size > 0
    mode = "mode=ro" if logged else "mode=ro&immutable=1"
    if not logged:
        _require_whole_pages(path)
    with closing(connect(path, mode, busy_timeout_s=1.0)) as connection:
        db = sqlite_utils.Database(connection, execute_plugins=False)
        tables, applied = db.table_names(), applied_migrations(db)
    known = known_migrations()
    unknown = [name for name in applied if name not in known]
    if unknown:
        raise StoreError(
            f"a measurement database must have a schema that this version knows: {path} has {', '.join(unknown)}, "
            f"known up to {known[-1]}; upgrade mla-tune"
        )
    if not applied and (tables or not create):
        raise StoreError(
            f"a measurement database must be one that mla-tune wrote: {path} holds "
            f"{'other tables' if tables else 'no tables'}; name another file"
        )


def _busy(path: Path) -> str:
    pid = _writer_pid(path)
    writer = f"process {pid}" if pid else "another process"
    return (
        f"a measurement database has one writer at a time: {path} is locked by {writer}; "
        "wait until it is done or stop it, then run again"
    )


def _writer_pid(path: Path) -> int | None:
    """Process that holds a write lock on the database, where the kernel lists locks (Linux); None elsewhere."""
    files = (path, Path(f"{path}-shm"))  # with a write-ahead log the lock is on the shared-memory file
    try:
        inodes = {file.stat().st_ino for file in files if file.exists()}
        locks = Path("/proc/locks").read_text()
    except OSError:
        return None
    for pid, inode in re.findall(r"POSIX +ADVISORY +WRITE +(\d+) +[0-9a-f]+:[0-9a-f]+:(\d+) ", locks):
        if int(inode) in inodes:
            return int(pid)
    return None


def _require_whole_pages(path: Path) -> None:
    """Refuse a file that was cut inside a page: SQLite would open it and read zeros there (file format, section 1.3)."""
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        return  # empty, or what SQLite itself refuses
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    size = path.stat().st_size
    if page_bytes and size % page_bytes:
        raise StoreError(
            f"a measurement database must be whole: {path} has {size} bytes, which is no multiple of its pages of "
            f"{page_bytes}: it was cut short; restore a copy of it"
        )
