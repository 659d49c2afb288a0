"""Writing a file so that a reader sees the old content or the new, never a part. Standard library only."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

_KEPT_BYTES = 200


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at ``path`` by ``data``, durably, or leave everything as it was and raise ``OSError``.

    The new content is written and synced under a temporary name in the same folder, then renamed over ``path``. A
    symbolic link is followed. Only a regular file is replaced: a rename onto ``/dev/null`` would destroy the device.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    temporary = target.with_name(f".{_shortened(target.name)}.{secrets.token_hex(4)}.tmp")
    try:
        _write_synced(temporary, data)
        os.replace(temporary, target)
    except BaseException:  # an interrupt must not leave the temporary file behind either
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _shortened(name: str) -> str:
    """As much of a file's name as leaves room for more: file systems count its bytes, of which a letter may have four."""
    return os.fsencode(name)[:_KEPT_BYTES].decode(errors="ignore")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; the content is in place by now, so a file system that cannot is no failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        return
    finally:
        os.close(descriptor)
