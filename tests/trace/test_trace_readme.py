"""Every command of the folder's README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mla_tune.cli import run as run_here
from tests.checkout import ROOT
from tests.trace.traces import document, kernel, write

README = (ROOT / "mla_tune" / "trace" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
COMPARISONS = [line for line in COMMANDS if line.startswith("mla-tune trace-diff ") and "cpu." not in line]
RECORDED = [line for line in COMMANDS if line not in COMPARISONS]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, each as a file of rank 0 and as a folder of two ranks."""
    for run in ("before", "after"):
        (tmp_path / run).mkdir()
        for rank in (0, 1):
            write(tmp_path / run / f"{rank}.json.gz", document([kernel(run, rank, 1)], rank))
        write(tmp_path / f"{run}.json.gz", document([kernel(run, 0, 1)], 0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMPARISONS)
def test_a_comparison_in_the_readme_runs(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(command.split()[1:]) == 0
    assert "CUDA wall" in capsys.readouterr().out
    assert (folder / "diff.html").exists() == ("--html" in command)


def test_the_pair_of_the_readme_is_recorded_and_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, compare = RECORDED
    assert run_here([*record.split()[1:], "--gpu", "cpu", "--repeats", "1"]) == 0
    assert f"next: {compare}\n" in capsys.readouterr().out
    assert run_here(compare.split()[1:]) == 0
    assert "CPU wall: B takes" in capsys.readouterr().out


def test_the_readme_names_commands_and_scripts_that_exist() -> None:
    assert len(COMPARISONS) >= 4
    for name in re.findall(r"`(scripts/\w+)`", README):
        assert (ROOT / name).is_file()
