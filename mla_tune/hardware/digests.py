"""A kernel library's files in one number: two builds may carry one version.

A wheel's compiled files are the same bytes on every machine. Reading them takes a tenth of a second, so what was read is
kept beside the sizes and times of the files, and read again only where these have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mla_tune.hardware.builds import SGL_KERNEL, VLLM

_CHUNK_BYTES = 1 << 20
_COMPILED = {VLLM: "_flashmla*.so", SGL_KERNEL: "flashmla_ops*.so"}
"""The compiled files that identify a package, by its name; of any other package all of them, however deep."""


def digest_library(folder: Path) -> str:
    """SHA-256 over a package's compiled files, or over its Python sources where it has none, in path order.

    Of vLLM and of SGLang's own kernels, which are of every kind, FlashMLA's file alone.

    Each file enters by its path in the package, its size and its bytes; where the package lies does not matter.
    """
    return _digest(folder, _files(folder))


def known_digest(folder: Path, cache: Path | None = None) -> str:
    """:func:`digest_library` of ``folder``, from the cache where the files are those that were read for it."""
    cache = _cache_file() if cache is None else cache
    known = _read(cache)
    entry = known.get(str(folder))
    if isinstance(entry, dict) and entry.get("files") == _stamps(folder, entry.get("files")):
        return str(entry.get("sha256"))
    files = _files(folder)
    names = [[path.relative_to(folder).as_posix()] for path in files]
    stamps = _stamps(folder, names)
    found = _digest(folder, files)
    if stamps == _stamps(folder, names):
        _write(cache, _read(cache) | {str(folder): {"files": stamps, "sha256": found}})
    return found


def _files(folder: Path) -> list[Path]:
    if folder.name in _COMPILED:
        return sorted(folder.glob(_COMPILED[folder.name]))
    return sorted(folder.rglob("*.so")) or sorted(folder.rglob("*.py"))


def _digest(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _stamps(folder: Path, files: Any) -> list[list[Any]] | None:
    """Path, size and times of each of ``files``, whose first entry is its path; None where one is not there."""
    try:
        paths = [str(file[0]) for file in files]
        found = [(path, os.stat(folder / path)) for path in paths]
    except (OSError, TypeError, IndexError, KeyError, ValueError):  # whatever stands in a cache
        return None
    return [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in found] or None


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "mla-tune" / "digests.json"


def _read(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(cache: Path, content: dict[str, Any]) -> None:
    """All of it or nothing; where nothing can be written the files are read again next time."""
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_name(f"{cache.name}.{os.getpid()}")
        aside.write_text(json.dumps(content))
        aside.replace(cache)
