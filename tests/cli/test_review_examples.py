"""The pre-commit hooks and the GitHub workflow of scripts/examples, run on a real git repository."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mla_tune.policy.codec import load_policy, write_policy
from mla_tune.policy.evidence import evidence_path
from tests.checkout import ROOT
from tests.cli.test_policy_review import NAME, STEM, changed, git, repository

__all__ = ["repository"]
EXAMPLES = ROOT / "scripts" / "examples"


def with_commands(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of a runner that has mla-tune and GitHub's gh on its path; gh writes down what it is asked."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    tune = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mla_tune "$@"\n'
    for name, text in (("mla-tune", tune), ("gh", '#!/bin/sh\nprintf "%s\\n" "$@" > gh.txt\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}


def run_hook(hook: dict[str, Any], repository: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The hook as pre-commit runs it: its entry, and the changed files as arguments."""
    return subprocess.run(
        [*shlex.split(hook["entry"]), NAME],
        cwd=repository,
        env=with_commands(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )


def hooks() -> dict[str, dict[str, Any]]:
    (local,) = yaml.safe_load((EXAMPLES / "pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    return {hook["id"]: hook for hook in local["hooks"]}


def test_the_hooks_pass_a_good_policy_and_print_what_it_changes(repository: Path, tmp_path: Path) -> None:
    found = hooks()
    done = run_hook(found["policy-lint"], repository, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    write_policy(NAME, changed(load_policy(NAME)))
    done = run_hook(found["policy-diff"], repository, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "with_kvcache -> sparse_fwd: " in done.stdout
    assert found["policy-diff"]["verbose"]


def test_the_lint_hook_stops_a_commit_of_a_broken_policy(repository: Path, tmp_path: Path) -> None:
    Path(NAME).write_text(Path(NAME).read_text().replace("take: sparse_fwd", "take: sparse_bwd", 1))
    done = run_hook(hooks()["policy-lint"], repository, tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{NAME}: error: ")


def test_a_new_policy_is_shown_by_the_hook(repository: Path, tmp_path: Path) -> None:
    git(repository, "rm", "--quiet", "--cached", NAME)
    git(repository, "commit", "--quiet", "--message", "Without it")
    done = run_hook(hooks()["policy-diff"], repository, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("GPU       nvidia-h100")


def test_the_hooks_are_asked_about_policies_alone() -> None:

    for hook in hooks().values():
        assert re.search(hook["files"], NAME)
        assert not re.search(hook["files"], "policies/policy.schema.json")
        assert not re.search(hook["files"], f"policies/{STEM}.evidence.json")


def steps() -> list[dict[str, Any]]:
    """The shell steps of the workflow that need no package index."""
    workflow = yaml.safe_load((EXAMPLES / "policy-review.yml").read_text())
    found = [step for step in workflow["jobs"]["review"]["steps"] if "run" in step]
    assert "pip install" in found[0]["run"]
    return found[1:]


def run_steps(repository: Path, tmp_path: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every step as GitHub runs it, in its order, until one fails."""
    environment = with_commands(
        tmp_path, GITHUB_BASE_REF="main", GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"), NUMBER="7", GH_TOKEN="-"
    )
    done = {}
    for step in steps():
        program = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done[step["name"]] = subprocess.run(
            program, cwd=repository, env=environment, capture_output=True, text=True, check=False
        )
        if done[step["name"]].returncode:
            break
    return done


@pytest.fixture
def pull_request(repository: Path) -> Path:
    """A branch that started from the remote's main, with one policy changed and one new."""
    git(repository, "update-ref", "refs/remotes/origin/main", "HEAD")
    write_policy(NAME, changed(load_policy(NAME)))
    evidence_path(NAME).unlink()  # of the policy before
    Path("policies/a copy.yaml").write_bytes((ROOT / NAME).read_bytes())
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "A change")
    return repository


def test_the_workflow_posts_the_changed_answers_and_shows_a_new_policy(pull_request: Path, tmp_path: Path) -> None:
    done = run_steps(pull_request, tmp_path)
    assert {name: step.returncode for name, step in done.items()} == {"Compare": 0, "Post": 0, "Lint": 0}
    comment = (pull_request / "comment.md").read_text()
    assert f"### Policy of nvidia-h100: `{NAME}`" in comment
    assert "measured shapes among them the new policy is " in comment
    assert "### New policy `policies/a copy.yaml`\n\n```\nGPU       nvidia-h100" in comment
    assert (tmp_path / "summary.md").read_text() == comment
    asked = (pull_request / "gh.txt").read_text().split("\n")
    assert asked[:5] == ["pr", "comment", "7", "--body-file", "comment.md"]
    assert "a copy.yaml: warning: is found only where it is named" in done["Lint"].stdout


def test_the_workflow_fails_for_a_policy_with_an_error(pull_request: Path, tmp_path: Path) -> None:
    path = pull_request / "policies" / "a copy.yaml"
    path.write_text(path.read_text() + f"# {'x' * 119}\n")
    done = run_steps(pull_request, tmp_path)
    assert done["Lint"].returncode != 0
    assert ": error: line " in done["Lint"].stdout


def test_a_pull_request_without_a_policy_posts_nothing(repository: Path, tmp_path: Path) -> None:
    git(repository, "update-ref", "refs/remotes/origin/main", "HEAD")
    done = run_steps(repository, tmp_path)
    assert [step.returncode for step in done.values()] == [0, 0, 0]
    assert not (repository / "gh.txt").exists()
