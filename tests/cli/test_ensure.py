"""``mla-tune ensure``: whether every table of an engine serves on this GPU, said by its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver_stand_in import H200, variables


def ensure(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_TUNE", "CUDA_VISIBLE"))}
    return subprocess.run(
        [sys.executable, "-m", "mla_tune", "ensure", *arguments],
        env={**kept, "MLA_TUNE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_where_a_build_is_missing_a_check_says_which_and_exits_with_1(tmp_path: Path) -> None:
    done = ensure(tmp_path, "--engine", "sglang", "--check", **variables(H200))
    assert done.returncode == 1
    assert "sgl-flash-mla must be 1.0.0: it is not installed" in done.stdout
    assert done.stderr.startswith("mla-tune: every table must serve sglang: ")
    assert "next: mla-tune ensure --engine sglang" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_states_file_evidence_and_every_reason(tmp_path: Path) -> None:
    told = json.loads(ensure(tmp_path, "--engine", "sglang", "--check", "--json", **variables(H200)).stdout)
    assert (told["engine"], told["gpu"], told["evidence"], told["complete"]) == (
        "sglang",
        "nvidia-h200",
        "measured",
        False,
    )
    assert told["serving"] < told["tables"]
    assert told["reasons"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "trtllm"), "accepted: own, sglang, vllm"),
        (("--engine", "sglang", "--budget", "0"), "--budget must be a positive number of seconds: got 0"),
        ((), "Missing option '--engine'"),
    ],
    ids=["unknown engine", "no time", "no engine"],
)
def test_a_wrong_argument_is_one_line(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = ensure(tmp_path, *arguments, **variables(H200))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_a_gpu_or_with_the_plugin_switched_off_it_says_so(tmp_path: Path) -> None:
    assert "ensure needs the GPU that will serve" in ensure(tmp_path, "--engine", "own", CUDA_VISIBLE_DEVICES="").stderr
    off = ensure(tmp_path, "--engine", "own", MLA_TUNE_MODE="off", **variables(H200))
    assert "MLA_TUNE_MODE=off is set" in off.stderr
