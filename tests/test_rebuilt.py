"""A committed policy counts as rebuilt only while nothing that a refit reads has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.rebuilt import ROOT, digest, fit_digest, fit_sources, meaning
from tests.test_artefacts import rebuilds


def test_what_a_fit_reads_is_its_package_and_what_that_imports_and_no_kernel() -> None:
    package = ROOT / "mla_tune"
    parts = {path.relative_to(package).parts[0] for path in fit_sources(package)}
    assert {"fit", "store", "policy", "sites", "cli"} <= parts
    assert not {"kernels", "sweep", "bench", "integrations"} & parts
    assert set((package / "fit").rglob("*.py")) <= set(fit_sources(package))


def test_a_comment_or_a_docstring_says_nothing_and_a_number_does() -> None:
    source = 'def f(x):\n    """Add."""\n    return x + 1\n'
    assert meaning(source) == meaning("def f(x):\n    return x + 1  # as before\n")
    assert meaning(source) != meaning(source.replace("1", "2"))
    assert meaning(source) != meaning(source.replace("+", "-"))
    assert meaning("y = 1") != meaning("y = 1.0") != meaning("y = True")


@pytest.mark.parametrize("part", ["fit", "store", "policy", "sites"])
def test_a_changed_line_anywhere_in_the_fit_changes_the_digest(part: str, tmp_path: Path) -> None:
    package = tmp_path / "mla_tune"
    shutil.copytree(ROOT / "mla_tune", package, ignore=shutil.ignore_patterns("__pycache__"))
    before = fit_digest(package)
    changed = max((path for path in fit_sources(package) if path.parent.name == part), key=lambda p: p.stat().st_size)
    changed.write_text(changed.read_text() + "\nchanged = True\n")
    fit_digest.cache_clear()
    assert fit_digest(package) != before
    fit_digest.cache_clear()


def test_changed_measurements_and_a_changed_policy_are_seen(tmp_path: Path) -> None:
    policy, export = tmp_path / "a.yaml", tmp_path / "a.jsonl"
    digests = set()
    for content in (("1", "2"), ("1", "3"), ("4", "2")):
        policy.write_text(content[0])
        export.write_text(content[1])
        digests.add(digest(policy, export))
    assert len(digests) == 3


def test_every_committed_policy_has_a_rebuild() -> None:
    assert {policy.name for policy, _ in rebuilds()} == {path.name for path in (ROOT / "policies").glob("*.yaml")}
