"""Temporary folders as schedulers and CI make them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from mla_tune.errors import MlaTuneError
from mla_tune.sweep.worker import process
from tests.command import run

SWEEP = (
    "sweep",
    "--gpu",
    "cpu",
    "--model",
    "deepseek-v4-flash",
    "--site",
    "indexer_metadata",
    "--budget",
    "1",
    "--no-fit",
)


def folder_of(root: Path, length: int, letter: str = "x") -> Path:
    """A folder below ``root`` whose path has ``length`` bytes, or a few less."""
    path = root
    while (left := length - len(str(path).encode()) - 1) > 0:
        path /= letter * min(left // len(letter.encode()) or 1, 50)
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize("name", ["x" * 50, "a b'\"$(c)", "目录"])
def test_a_sweep_runs_below_a_temporary_folder_of_any_length_and_letters(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    if name.startswith("x"):
        folder = folder_of(folder, 200)
    done = run(tmp_path, *SWEEP, TMPDIR=str(folder))
    assert (done.returncode, "points measured in" in done.stderr) == (0, True), done.stderr
    assert not [*folder.glob("mla-tune*"), *folder.glob("pymp-*")]


def test_only_the_socket_leaves_a_temporary_folder_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = folder_of(tmp_path, 150)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with process._short_temporary_folder():
        assert len(tempfile.gettempdir()) < 72
    assert tempfile.gettempdir() == str(long)


def test_without_any_short_folder_one_line_names_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder_of(tmp_path, 150)))
    monkeypatch.setattr(process, "_SHORT_FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(MlaTuneError, match="set TMPDIR to a shorter path") as caught, process._short_temporary_folder():
        pass
    assert "\n" not in str(caught.value)
