"""The wishes of a fit on the command line, on the results of one real sweep."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.cli import run as run_here
from mla_tune.cli.options import byte_count
from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.evidence import load_evidence
from mla_tune.sites.served_shapes import ServedShape, Traffic, write_traffic
from tests.cli.conftest import SWEEP
from tests.cli.test_refusals import refusal

POLICY, RECORDED = Path("policies/cpu.yaml"), Path("met.jsonl")


def record(site: str = "indexer_metadata", num_qo_tokens: int | None = None) -> None:
    """Twelve forwards at the largest shape that was measured, or with other query tokens."""
    measured = load_policy(POLICY).tables[0].measured
    largest = num_qo_tokens or measured.num_qo_tokens[1], measured.kv_tokens[1], measured.num_reqs[1]
    write_traffic(RECORDED, Traffic({ServedShape(site, "deepseek-v4-flash", *largest): 12}))


def test_the_command_in_a_policy_makes_it_again_with_every_wish(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record()
    wishes = ("--regime", "eager", "--traffic", str(RECORDED), "--max-workspace-bytes", "512MiB")
    assert run_here(("fit", "--gpu", "cpu", *wishes)) == 0
    assert "by traffic" in capsys.readouterr().out
    policy, first = load_policy(POLICY), POLICY.read_bytes()
    assert policy.regime == "eager"
    stated = load_evidence(POLICY, digest(first))
    assert stated is not None
    assert stated.objective is not None
    assert stated.objective.forwards == 12
    words = shlex.split(policy.source.command)
    assert words[-6:] == ["--regime", "eager", "--traffic", str(RECORDED), "--max-workspace-bytes", str(512 << 20)]
    POLICY.unlink()
    assert run_here(words[1:]) == 0
    assert POLICY.read_bytes() == first


def test_a_sweep_passes_its_traffic_on_to_the_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record()
    assert run_here((*SWEEP, "--traffic", str(RECORDED))) == 0
    policy = load_policy(POLICY)
    stated = load_evidence(POLICY, digest(POLICY.read_bytes()))
    assert stated is not None
    assert stated.objective is not None
    assert f"--traffic {RECORDED}" in policy.source.command


def test_traffic_that_weighs_nothing_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(site="moe")
    code, line = refusal(capsys, folder, "fit", "--gpu", "cpu", "--traffic", str(RECORDED))
    assert code == 1
    assert "got moe of deepseek-v4-flash; accepted: indexer_metadata of deepseek-v4-flash" in line
    code, line = refusal(capsys, folder, *SWEEP, "--traffic", str(RECORDED))
    assert code == 2
    assert f"got none in {RECORDED}; accepted: indexer_metadata of deepseek-v4-flash" in line
    record(num_qo_tokens=1 << 30)  # outside the measured ranges no row decides
    assert refusal(capsys, folder, "fit", "--gpu", "cpu", "--traffic", str(RECORDED))[0] == 1


@given(st.integers(1, (1 << 63) - 1), st.sampled_from([("", 1), ("KiB", 1 << 10), ("MB", 10**6), (" gib ", 1 << 30)]))
def test_bytes_are_read_exactly_in_every_unit(count: int, unit: tuple[str, int]) -> None:
    whole = max(1, count // unit[1])
    if whole < 10**18:
        assert byte_count("--cap", f"{whole}{unit[0]}") == whole * unit[1]


def test_bytes_may_have_decimals() -> None:
    assert byte_count("--cap", "1.5GiB") == 3 << 29
