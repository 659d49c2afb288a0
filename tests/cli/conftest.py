"""One real sweep, small enough for every machine, and copies of the folder that it leaves."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import run

SWEEP = ("sweep", "--gpu", "cpu", "--model", "deepseek-v4-flash", "--site", "indexer_metadata")


@dataclass(frozen=True)
class Swept:
    """A folder where ``sweep`` ran, and what it said."""

    folder: Path
    result: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The folder of the one sweep; not to be written to."""
    folder = tmp_path_factory.mktemp("swept")
    return Swept(folder, run(folder, *SWEEP))


@pytest.fixture
def folder(swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder of the test and the user's folder."""
    assert swept.result.returncode == 0, swept.result.stderr
    copy = tmp_path / "work"
    shutil.copytree(swept.folder, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("MLA_TUNE_HOME", ".")
    return copy


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes; None for what is no regular file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
