"""What commands write lies in the user's folder, not in the current one, an installed package or a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT, copy_checkout
from tests.cli.conftest import SWEEP, contents
from tests.command import SOON_S

LEFT = {"db", "db/cpu.db", "db/cpu.jsonl", "policies", "policies/cpu.yaml", "policies/cpu.evidence.json"}


def environment(package: Path, **variables: str) -> dict[str, str]:
    """The variables of a user who has ``package`` on the path, and has set nothing for mla-tune."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLA_TUNE_")}
    return {**kept, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **variables}


def run(*command: str | Path, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=SOON_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_installed_package_and_the_current_folder_stay_as_they_are(tmp_path: Path) -> None:
    site, work, data = (tmp_path / name for name in ("site", "work", "data"))
    work.mkdir()
    # What a wheel lays out: tests/test_packaging.py compares its files with these.
    shutil.copytree(ROOT / "mla_tune", site / "mla_tune", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "policies", site / "mla_tune" / "policies", ignore=shutil.ignore_patterns("*.json"))
    before, env = contents(site), environment(site, XDG_DATA_HOME=str(data))
    command = (sys.executable, "-m", "mla_tune")
    assert run(*command, *SWEEP, cwd=work, env=env)
    assert set(contents(data / "mla-tune")) >= LEFT
    place = ("1", "4K", "--gpu", "cpu", "--model", "deepseek-v4-flash", "--site", "indexer_metadata")
    for words in (("lookup", *place), ("policy", "show", "--gpu", "cpu"), ("fit", "--gpu", "cpu")):
        told = json.loads(run(*command, *words, "--json", cwd=work, env=env))
        own = str(data / "mla-tune" / "policies" / "cpu.yaml")
        assert told.get("path", own) == own
        assert words[0] == "fit" or told["answered_by"]["place"] == "user"
    assert contents(work) == {}
    assert contents(site) == before


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_run_in_a_clone_leaves_git_status_clean(tmp_path: Path) -> None:
    clone, data = tmp_path / "clone", tmp_path / "data"
    clone.mkdir()
    copy_checkout(clone)
    shutil.copy(ROOT / ".gitignore", clone)
    env = environment(clone, XDG_DATA_HOME=str(data))
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "as released")):
        run(*git, *words, cwd=clone, env=env)
    give_virtualenv(clone, env)
    run(clone / "scripts" / "run", *SWEEP, cwd=clone, env=env)
    assert run(*git, "status", "--porcelain", cwd=clone, env=env) == ""
    assert set(contents(data / "mla-tune")) >= LEFT


def give_virtualenv(clone: Path, env: dict[str, str]) -> None:
    """A ``.venv`` that ``scripts/run`` takes for one that it has set up: this environment's packages, the clone's code."""
    venv = clone / ".venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=clone, env=env)
    (site,) = venv.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join([str(clone), *here, ""]))
    command = venv / "bin" / "mla-tune"
    command.write_text(f"#!{venv}/bin/python\nfrom mla_tune.cli import main\nif __name__ == '__main__':\n    main()\n")
    command.chmod(0o755)
    extras = 'has_nvidia_gpu && extras=tune,gpu || extras=tune; installation_stamp "$extras" > .venv/.installed-for-run'
    run("bash", "-c", f"source scripts/venv.sh; {extras}", cwd=clone, env=env)
