"""The command ``plan``, by the committed H200 policy and measurements; one measurement on this machine's CPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mla_tune.cli import run

ROOT = Path(__file__).parents[2]
FLASH = ("plan", "--model", "deepseek-v4-flash", "--gpu", "h200")
SMALL = ("--fresh", "6:9", "--extends", "2:3", "--new", "1:2", "--context", "100:900")


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the committed policies and measurements, which is the current one."""
    for name in ("db", "policies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.db*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLA_TUNE_HOME", ".")
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = run(arguments)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(output(capsys, *arguments, "--json"))


def test_batches_are_drawn_and_their_gains_told_as_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    told = as_json(capsys, *FLASH, "--batches", "15", "--seed", "3")
    assert (told["model"], told["h_q"], told["gpu"], told["layer"]) == ("deepseek-v4-flash", 64, "nvidia-h200", "each")
    assert len(told["batches"]) == 15
    assert told["measured"] is None
    for batch in told["batches"]:
        assert [entry["layers"] for entry in batch["layers"]] == [2, 21, 20]
        single_us = sum(entry["layers"] * entry["plan"]["single_us"] for entry in batch["layers"])
        planned_us = sum(entry["layers"] * entry["plan"]["predicted_us"] for entry in batch["layers"])
        assert batch["predicted_gain"] == pytest.approx(single_us / planned_us)
        assert batch["predicted_gain"] >= 1
        if batch["kind"] == "equal":
            assert batch["predicted_gain"] == 1
    promised = [batch["predicted_gain"] for batch in told["batches"] if batch["predicted_gain"] > 1]
    assert told["promised"]["batches"] == len(promised) > 5
    assert told["promised"]["worst"] == min(promised)
    printed = " ".join(output(capsys, *FLASH, "--batches", "15", "--seed", "3").split())
    assert f"promised: {len(promised)} of 15 batches are split" in printed
    assert "8 to 63 extends of 4 to 128 new tokens on 65536 to 524288 cached ones" in printed
    assert "predicted from the measurements behind the policy" in printed
    assert as_json(capsys, *FLASH, "--batches", "15", "--seed", "3") == told
    assert as_json(capsys, *FLASH, "--batches", "15", "--seed", "4") != told


@pytest.mark.parametrize("layer", ["forward", "c4a", "swa_only"])
def test_one_table_plans_a_forward_or_a_layer(layer: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = as_json(capsys, *FLASH, "--batches", "6", "--layer", layer)
    assert {(e["layer"], e["layers"]) for batch in told["batches"] for e in batch["layers"]} == {(layer, 1)}


def test_both_single_paths_and_the_split_are_measured_on_this_machine(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(checkout.rglob("*"))
    model = ("plan", "--model", "deepseek-v3.2", "--h-q", "64", "--gpu", "cpu")
    assert run([*model, "--batches", "5", "--measure", *SMALL, "--json"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    told = json.loads(captured.out)
    assert [batch["kind"] for batch in told["batches"]] == ["mixed"] * 4 + ["fresh"]
    for batch in told["batches"]:
        (timed,) = batch["measured"]
        assert timed["faults"] == []
        singles = dict(timed["single_us"])
        assert set(singles) == {"sparse_fwd", "with_kvcache"}
        assert batch["measured_split_gain"] == pytest.approx(min(singles.values()) / timed["split_us"])
        (entry,) = batch["layers"]
        promised = len(entry["plan"]["parts"]) == 2
        taken_us = timed["split_us"] if promised else singles[entry["plan"]["best_single"]]
        assert batch["measured_gain"] == pytest.approx(min(singles.values()) / taken_us)
    assert sorted(checkout.rglob("*")) == before


def test_a_measurement_is_told_batch_by_batch_with_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("plan", "--model", "deepseek-v4-flash", "--gpu", "cpu", "--layer", "c4a")
    assert run([*model, "--batches", "2", "--measure", *SMALL]) == 0
    captured = capsys.readouterr()
    assert "batch 2 of 2" in captured.err
    printed = " ".join(captured.out.split())
    assert re.search(r"plans below 0.98 of the fastest single path as measured: \d of 2", printed)
    assert "measured where promised 1.15 or more:" in printed
    assert "batches at which a path failed or differed from the reference: 0" in printed


REFUSALS = {
    "no model": (["plan"], 2, "--model"),
    "an unknown model": (["plan", "--model", "v4"], 2, "model must be a known one"),
    "heads of another model": ([*FLASH, "--h-q", "128"], 2, "got 128; accepted: 64"),
    "an unknown layer": ([*FLASH, "--layer", "dsa"], 2, "accepted: each, swa_only, c4a, c128a, forward"),
    "no batches": ([*FLASH, "--batches", "0"], 2, "got 0"),
    "too many batches": ([*FLASH, "--batches", "10001"], 2, "got 10001"),
    "a range in words": ([*FLASH, "--fresh", "long"], 2, "--fresh must be two numbers: got 'long'"),
    "one number": ([*FLASH, "--extends", "5"], 2, "--extends must be two numbers"),
    "a negative number": ([*FLASH, "--new=-1:5"], 2, "--new must be two numbers"),
    "a huge number": ([*FLASH, "--context", f"1:{'9' * 5000}"], 2, "--context must be two numbers"),
    "a range from high to low": ([*FLASH, "--context", "9:5"], 2, "got 9:5"),
    "a range from nothing": ([*FLASH, "--new", "0:5"], 2, "new_tokens must be drawn between 1"),
    "more requests than a forward": ([*FLASH, "--extends", "70000:70000"], 2, "1 to 65536 requests"),
    "a policy that is not there": (
        ["plan", "--model", "deepseek-v3.2", "--gpu", "cpu", "--policy", "no.yaml"],
        1,
        "no.yaml",
    ),
    "measurements of another gpu": ([*FLASH, "--measurements", "db/cpu.jsonl"], 1, "measured on cpu"),
    "another gpu's policy": (
        ["plan", "--model", "deepseek-v3.2", "--gpu", "cpu", "--policy", "policies/nvidia-h200.yaml"],
        2,
        "policies/nvidia-h200.yaml is for nvidia-h200, --gpu names cpu",
    ),
    "another gpu's predictions": (
        ["plan", "--model", "deepseek-v3.2", "--policy", "policies/nvidia-h200.yaml", "--batches", "1", "--measure"],
        1,
        "policies/nvidia-h200.yaml is for nvidia-h200, this machine is cpu",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.match(r"mla-tune: \S", captured.err)
    assert said in captured.err
    assert len(captured.err) < 700
