"""``policy diff`` and ``policy lint`` as a reviewer runs them: on files, on git's revisions, in a hook and a workflow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla_tune.cli import run
from mla_tune.policy.codec import load_policy, write_policy
from mla_tune.policy.schema import Limit, Policy
from mla_tune.sites.served_shapes import ServedShape, Traffic, write_traffic
from tests.policy.strategies import modelled_policy

ROOT = Path(__file__).parents[2]
STEM = "nvidia-h100.sglang"
"""The smallest of the measured ones."""
NAME, EXPORT = f"policies/{STEM}.yaml", f"db/{STEM}.jsonl"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Reviewer", "-c", "user.email=reviewer@example.com", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a committed policy, its evidence and its measurements; the current folder."""
    folder = tmp_path / "a repository"
    for name in (NAME, f"policies/{STEM}.evidence.json", EXPORT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "A policy")
    monkeypatch.chdir(folder)
    return folder


def changed(policy: Policy) -> Policy:
    """The policy with a lower limit, and V3.2's whole forwards always over the workspace."""

    def of(table: Any) -> Any:
        if (table.model, table.h_q, table.layer, table.engine) == ("deepseek-v3.2", 128, "dsa", "sglang"):
            last = msgspec.structs.replace(table.rows[-1].choices[-1], candidate="sparse_fwd")
            only = msgspec.structs.replace(last, threshold=type(last.threshold).level(0))
            row = msgspec.structs.replace(table.rows[0], choices=(only,))
            limits = (Limit(candidate="with_kvcache", num_qo_tokens=11622),)
            return msgspec.structs.replace(table, rows=(row,), limits=limits)
        return table

    return msgspec.structs.replace(policy, tables=tuple(map(of, policy.tables)))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints; it must end with ``code``."""
    capsys.readouterr()
    assert run(["policy", *arguments]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_working_file_is_compared_with_the_committed_one(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = printed(capsys, "diff", f"HEAD:{NAME}", NAME, "--exit-code")
    assert alike.rstrip().endswith("verdict: no difference that a server sees")
    assert "what no server sees" not in alike
    write_policy(NAME, changed(load_policy(NAME)))
    told = printed(capsys, "diff", f"HEAD:{NAME}", NAME, "--exit-code", code=1)
    assert "prefill_attention of deepseek-v3.2, 128 heads, dsa" in told
    assert "  with_kvcache -> sparse_fwd: " in told
    assert "limit of with_kvcache: none -> 11622" in " ".join(told.split())
    assert f"judged    by the measurements in {EXPORT}" in told
    verdict = " ".join(told[told.index("verdict: ") :].split())
    assert "change the answer; at " in verdict
    assert "measured shapes among them the new policy is " in verdict
    assert verdict.endswith("x slower")
    assert "evidence beside the policy: there -> none" in told
    assert max(map(len, told.splitlines())) <= 80


def test_every_form_says_the_same(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_policy(NAME, changed(load_policy(NAME)))
    found = json.loads(printed(capsys, "diff", f"HEAD:{NAME}", NAME, "--json"))
    (table,) = found["tables"]
    (measured,) = found["measured"]
    assert (table["model"], table["layer"], found["changed"]) == ("deepseek-v3.2", "dsa", table["changed"])
    assert 0 < measured["changed"] <= measured["measured"]
    assert found["old_over_new_time"] < 1
    marked = printed(capsys, "diff", f"HEAD:{NAME}", NAME, "--markdown")
    assert f"{measured['changed']} of {measured['measured']}" in marked
    assert f"**{found['verdict'][0].upper()}{found['verdict'][1:]}.**" in marked
    rows = [line for line in marked.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6}
    assert found["verdict"] in " ".join(printed(capsys, "diff", f"HEAD:{NAME}", NAME).split())


def test_what_the_curves_expect_is_marked_as_a_prediction(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_policy(NAME, changed(load_policy(NAME)))
    assert "PREDICTED" not in printed(capsys, "diff", f"HEAD:{NAME}", NAME)
    assert "PREDICTED by cost curves at " in printed(capsys, "diff", f"HEAD:{NAME}", NAME, "--predict")


def test_recorded_traffic_takes_the_place_of_the_grid(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_policy(NAME, changed(load_policy(NAME)))
    site = "prefill_attention", "deepseek-v3.2"
    write_traffic(
        "met.jsonl", Traffic({ServedShape(*site, 16, 1 << 20, 1): 3, ServedShape(*site, 8192, 1 << 17, 1): 997})
    )
    told = " ".join(printed(capsys, "diff", f"HEAD:{NAME}", NAME, "--traffic", "met.jsonl").split())
    assert "0.30 % of forwards (3 of 1000) change the answer" in told


def test_without_measurements_the_answers_are_compared_all_the_same(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_policy(NAME, changed(load_policy(NAME)))
    shutil.move("db", "elsewhere")
    told = " ".join(printed(capsys, "diff", f"HEAD:{NAME}", NAME).split())
    assert f"not judged: no export {EXPORT} here" in told
    again = printed(capsys, "diff", f"HEAD:{NAME}", NAME, "--db", f"elsewhere/{STEM}.jsonl")
    assert "measured shapes among them" in " ".join(again.split())


def test_a_modelled_policy_claims_no_measured_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    before = modelled_policy()
    write_policy(one, before)
    first = before.tables[0]
    rows = (msgspec.structs.replace(first.rows[0], choices=first.rows[0].choices[:1]), *first.rows[1:])
    write_policy(other, msgspec.structs.replace(before, tables=(msgspec.structs.replace(first, rows=rows),)))
    told = " ".join(printed(capsys, "diff", str(one), str(other), "--db", str(ROOT / EXPORT)).split())
    assert "not judged: nothing was timed on this GPU" in told


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ("HEAD:policies/none.yaml", NAME),
            1,
            "a policy must be a file, or REVISION:PATH of git: got HEAD:policies/none",
        ),
        (("v9:" + NAME, NAME), 1, f"got v9:{NAME}: "),
        (("--output=x:" + NAME, NAME), 2, "No such option"),
        (("none.yaml", NAME), 1, "none.yaml: No such file or directory"),
        ((NAME, str(ROOT / "policies" / "nvidia-h200.yaml")), 2, "got nvidia-h100 and nvidia-h200"),
        ((NAME, NAME, "--traffic", "none.jsonl"), 1, "a traffic file must be readable: got none.jsonl"),
        ((NAME,), 2, "Missing argument 'NEW'"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    arguments: tuple[str, ...], code: int, said: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["policy", "diff", *arguments]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_evidence_of_another_policy_is_a_warning(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(NAME).read_text()
    Path(NAME).write_text(text.replace("Generated, do not edit.", "Edited."))
    told = " ".join(printed(capsys, "diff", f"HEAD:{NAME}", NAME).split())
    assert f"warning evidence of {NAME}: must be the evidence of the policy beside it" in told
    assert told.endswith("verdict: no difference that a server sees")


def test_lint_prints_a_line_per_finding_and_its_exit_code_says_how_bad(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printed(capsys, "lint", "--no-builds", "--strict", NAME) == ""
    warned = printed(capsys, "lint", NAME)
    assert warned.startswith(f"{NAME}: warning: not installed here, so whether tables are stale is not known: ")
    assert printed(capsys, "lint", "--strict", NAME, code=1) == warned
    Path(NAME).write_text(Path(NAME).read_text() + f"# {'x' * 119}\n")
    told = printed(capsys, "lint", "--no-builds", NAME, code=1).splitlines()
    assert all(re.match(rf"{re.escape(NAME)}: (error|warning): .", line) for line in told)
    found = json.loads(printed(capsys, "lint", "--no-builds", "--json", NAME, code=1))
    assert [f"{of['file']}: {of['severity']}: {of['message']}" for of in found] == told


def test_lint_goes_on_after_a_file_that_cannot_be_read(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "lint", "--no-builds", "none.yaml", "policies", NAME, code=1).splitlines()
    assert len(told) == 2
    assert told[0].startswith("none.yaml: error: a policy file must be readable: got none.yaml: No such file")
    assert told[1].startswith("policies: error: a policy file must be readable: got policies: Is a directory")


def test_lint_without_a_file_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["policy", "lint"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
