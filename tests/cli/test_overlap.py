"""A fit of the committed measurements whose neighbouring queries share most of their selection."""

from __future__ import annotations

import shutil
from pathlib import Path

from mla_tune.policy.codec import load_policy
from tests.command import run

ROOT = Path(__file__).parents[2]


def test_a_fit_of_overlapping_selections_serves_the_selected_rows_and_leaves_the_other_policy_alone(
    tmp_path: Path,
) -> None:
    for name in ("db/nvidia-h200.jsonl", "policies/nvidia-h200.yaml"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    before = (tmp_path / "policies/nvidia-h200.yaml").read_bytes()
    fit = run(tmp_path, "fit", "--gpu", "h200", "--overlap", "80")
    assert (fit.returncode, fit.stderr) == (0, "")
    assert (tmp_path / "policies/nvidia-h200.yaml").read_bytes() == before
    policy = load_policy(tmp_path / "policies/nvidia-h200.overlap-80.yaml")
    assert policy.overlap == 80
    served = {choice.candidate for table in policy.tables for row in table.rows for choice in row.choices}
    assert "sparse_fwd_selected" in served
    c4a = next(table for table in policy.tables if (table.model, table.layer) == ("deepseek-v4-flash", "c4a"))
    assert {limit.candidate: limit.num_qo_tokens for limit in c4a.limits} == {"with_kvcache": 83379}  # as found without
    again = run(tmp_path, *policy.source.command.split()[1:])
    assert again.returncode == 0
    assert load_policy(tmp_path / "policies/nvidia-h200.overlap-80.yaml") == policy


def test_a_fit_of_selections_that_nobody_measured_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    shutil.copy(ROOT / "db/nvidia-h200.jsonl", tmp_path / "db")
    fit = run(tmp_path, "fit", "--gpu", "h200", "--overlap", "50")
    assert fit.returncode == 1
    assert "--overlap 50 needs measurements of such selections: got none in db/nvidia-h200.jsonl; next:" in fit.stderr
    assert fit.stderr.count("\n") == 1
    assert not (tmp_path / "policies").exists()
