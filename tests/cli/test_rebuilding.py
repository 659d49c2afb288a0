"""``fit --check``: a policy is what its own command makes of its measurements, whatever its file is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_tune.cli import run as run_here
from mla_tune.policy.evidence import evidence_path
from tests.cli.conftest import contents

POLICY = Path("policies/cpu.yaml")


def test_a_policy_of_any_name_is_made_again_and_nothing_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Path("tables.yaml")
    assert run_here(("fit", "--gpu", "cpu", "--out", str(elsewhere))) == 0
    before = contents(folder)
    for path in (POLICY, elsewhere):
        capsys.readouterr()
        assert run_here(("fit", "--check", str(path))) == 0
        assert capsys.readouterr().out == f"{path} is what its command makes of its measurements, byte for byte\n"
    assert contents(folder) == before
    assert elsewhere.read_bytes() == POLICY.read_bytes()


def test_a_changed_line_is_named_with_what_the_command_makes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = POLICY.read_text()
    POLICY.write_text(text.replace("Generated, do not edit.", "Edited.", 1))
    assert run_here(("fit", "--check", str(POLICY))) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "cpu.yaml:2: - # mla-tune: what serves on cpu" in told
    assert "Edited." in told
    assert "Generated, do not edit." in told
    assert "must be what its command makes of its measurements" in told
    assert "Traceback" not in told


def test_changed_evidence_is_found_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = evidence_path(POLICY)
    beside.write_bytes(beside.read_bytes().replace(b'"mean": 1.', b'"mean": 2.', 1))
    assert run_here(("fit", "--check", str(POLICY))) == 1
    assert "cpu.evidence.json:" in capsys.readouterr().err


def test_a_policy_whose_measurements_are_elsewhere_says_so_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("db/cpu.jsonl").unlink()
    assert run_here(("fit", "--check", str(POLICY))) == 1
    told = capsys.readouterr().err
    assert told.startswith("mla-tune: policies/cpu.yaml: its command must run here, where its measurements are: ")
    assert told.count("\n") == 1
