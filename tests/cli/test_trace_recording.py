"""``trace`` records a pair on this machine that ``trace-diff`` then compares."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from mla_tune.cli import run as run_here
from tests.checkout import ROOT

GOLDEN = ROOT / "tests" / "policy" / "golden.yaml"
SHAPE = ("trace", "16", "2K", "--model", "deepseek-v4-flash", "--gpu", "cpu", "--repeats", "1")
METADATA = (*SHAPE, "--site", "indexer_metadata")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    code = run_here(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out.splitlines()


def test_the_pair_of_a_policys_choice_and_the_incumbent_is_recorded_and_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, then = printed(capsys, *SHAPE, "--policy", str(GOLDEN), "--out", "pair")
    where = "prefill_attention/c4a/h64/k512, 16 query tokens, 2048 context tokens"
    assert a == f"A: sparse_fwd at {where}: pair/cpu.sparse_fwd.json.gz"
    assert b == f"B: with_kvcache at {where}: pair/cpu.with_kvcache.json.gz"
    assert sorted(path.name for path in folder.rglob("*.gz")) == ["cpu.sparse_fwd.json.gz", "cpu.with_kvcache.json.gz"]
    program, *arguments = shlex.split(then.removeprefix("next: "))
    assert program == "mla-tune"
    found = json.loads("".join(printed(capsys, *arguments, "--json")))
    assert found["lane"] == "CPU"
    # A round and its stages: what sparse_fwd runs here has more of them.
    assert [found[side]["annotations"] for side in "ab"] == [7, 3]
    assert sum(line["delta_ns"] for line in account(found)) == found["b"]["wall_ns"] - found["a"]["wall_ns"]


def account(found: dict[str, dict[str, list[dict[str, int]]]]) -> list[dict[str, int]]:
    return found["account"]["wall"]


def test_two_candidates_that_are_named_need_no_policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, *METADATA, "--candidate", "deep_gemm", "--candidate", "jit")
    assert sorted(path.name for path in folder.iterdir()) == ["cpu.deep_gemm.json.gz", "cpu.jit.json.gz"]


def test_one_candidate_is_compared_with_the_engines_default(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *METADATA, "--candidate", "deep_gemm")
    assert [line.split()[1] for line in lines[:2]] == ["jit", "deep_gemm"]


REFUSALS = {
    "a choice that is the incumbent": (
        [*SHAPE[:1], "8192", "16K", *SHAPE[3:], "--policy", str(GOLDEN)],
        "got sparse_fwd twice, the engine's default there; accepted with --candidate: sparse_fwd_fused, ",
    ),
    "a pair of one": ([*METADATA, "--candidate", "jit"], "got jit twice"),
    "one candidate twice": ([*METADATA, "--candidate", "jit", "--candidate", "jit"], "got jit, jit"),
    "three candidates": ([*SHAPE, *(f"--candidate={name}" for name in "abc")], "one or two different ones: got a, b, c"),
    "an unknown candidate": ([*SHAPE, "--candidate", "fast"], "got 'fast'; accepted: sparse_fwd, "),
    "a candidate of another site": ([*METADATA, "--candidate", "sparse_fwd"], "got 'sparse_fwd'; accepted: deep_gemm, jit"),
    "no round": ([*SHAPE, "--repeats", "0"], "got 0; accepted: 1 to 1000"),
    "an unknown layer": ([*SHAPE, "--layer", "c5a"], "got 'c5a'; accepted: swa_only, c4a, c128a"),
    "a whole forward": ([*SHAPE, "--layer", "forward"], "--layer must be a layer type: got 'forward'"),
    "an unknown site": ([*SHAPE, "--site", "moe"], "got 'moe'; accepted: prefill_attention"),
    "an unknown model": (["trace", "1", "1", "--model", "v4", "--gpu", "cpu"], "got 'v4'; accepted: deepseek"),
    "more queries than context": (["trace", "9", "4", *SHAPE[3:]], "num_qo_tokens=9, kv_tokens=4"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_recorded_is_one_line_and_leaves_no_file(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_a_shape_that_does_not_fit_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("trace", "16M", "64M", "--model", "deepseek-v4-flash", "--gpu", "cpu")
    assert run_here([*arguments, "--candidate", "with_kvcache"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mla-tune: the inputs of this shape must fit here: ")
    assert error.count("\n") == 1
    assert list(folder.rglob("*.gz")) == []
