"""What a server's container has: the base install, without torch, Optuna and whatever else only measuring needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import files, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mla_tune.cli.options import token_count
from mla_tune.errors import UsageError
from tests.driver_stand_in import H200, variables

ROOT = Path(__file__).parents[2]

WITHOUT = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Missing())
from mla_tune.cli import run
sys.exit(run(sys.argv[1:]))
"""


def only_for_measuring() -> list[str]:
    """Modules that the ``tune`` extra alone brings, by their import names."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {"nvidia-ml-py": "pynvml", "sqlite-utils": "sqlite_utils"}
    words = [line.split(";")[0].split(">")[0].split("<")[0].split("=")[0].strip() for line in extras["tune"]]
    return sorted(named.get(word, word) for word in words)


def run_without_them(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = WITHOUT.format(names=only_for_measuring())
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "arguments",
    [
        ("lookup", "8192", "128K", "--model", "deepseek-v4-pro", "--gpu", "h200"),
        ("policy", "show", "--gpu", "h200"),
        ("policy", "lint", "--no-builds", "policies/nvidia-h200.yaml"),
        ("policy", "diff", "policies/nvidia-h200.yaml", "policies/nvidia-h200.yaml"),
        ("policy", "schema"),
        ("doctor",),
        ("ensure", "--help"),
        ("env",),
        ("trace-diff", "--help"),
        ("--help",),
    ],
    ids=" ".join,
)
def test_a_base_install_has_the_commands_that_a_container_needs(arguments: tuple[str, ...]) -> None:
    done = run_without_them(*arguments)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtualenv with the package, what it requires, and nothing else: no torch, no pip."""
    venv = tmp_path_factory.mktemp("base") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    for name in required_by(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]):
        for file in files(name) or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
    ignored = shutil.ignore_patterns("__pycache__", "*.json")
    shutil.copytree(ROOT / "mla_tune", site / "mla_tune", ignore=ignored)
    shutil.copytree(ROOT / "policies", site / "mla_tune" / "policies", ignore=ignored)
    return venv / "bin" / "python"


def required_by(lines: Iterable[str]) -> set[str]:
    """Distributions that these requirements bring, and theirs, as they are installed here."""
    found: set[str] = set()
    wanted = [Requirement(line) for line in lines]
    while wanted:
        requirement = wanted.pop()
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(requirement.name)
        wanted += map(Requirement, requires(requirement.name) or ())
    return found


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("env",), 0, "detecting the environment needs torch"),
        (("env", "--json"), 0, '"torch": ""'),
        (
            ("lookup", "8192", "128K", "--model", "deepseek-ai/DeepSeek-V4-Pro", "--gpu", "h200"),
            0,
            "choice: sparse_fwd",
        ),
        (("lookup", "8192", "128K", "--model", "deepseek-v4-pro", "--as-served"), 0, "MLA_TUNE_MODE=pin:with_kvcache"),
        (("policy", "show", "--gpu", "h200"), 0, "20 of 20 tables serve sglang"),
        (("ensure", "--check", "--engine", "sglang"), 1, "sgl-flash-mla must be 1.0.0: it is not installed"),
    ],
    ids=["env", "env as JSON", "lookup", "lookup as served", "policy show", "ensure"],
)
def test_in_a_virtualenv_of_the_base_install_they_work_and_write_nothing(
    arguments: tuple[str, ...], code: int, said: str, base: Path, tmp_path: Path
) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    server = {"HOME": str(home), "PATH": "/usr/bin:/bin", "MLA_TUNE_MODE": "pin:with_kvcache", **variables(H200)}
    command = [str(base), "-B", "-m", "mla_tune", *arguments]
    done = subprocess.run(command, cwd=work, env=server, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert said in " ".join(done.stdout.split())
    assert done.stderr.count("\n") == (0 if code == 0 else 1)
    assert list(work.iterdir()) == []
    assert not (home / ".local").exists()


def test_what_measures_names_the_package_that_it_lacks() -> None:
    done = run_without_them("fit", "--gpu", "h200")
    assert done.returncode == 1
    assert "pip install 'mla-tune[tune]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "count"), [("131072", 131072), ("131_072", 131072), ("128K", 131072), ("1m", 1 << 20), (8192, 8192)]
)
def test_a_count_is_written_as_contexts_are_named(text: object, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["", "K", "-5", "1.5K", "12x", "1e3", "9" * 30, "1 000"])
def test_what_is_no_count_is_refused_in_one_line_with_its_value(text: str) -> None:
    with pytest.raises(UsageError, match=r"accepted: 131072, 128K or 1M") as refused:
        token_count(text)
    assert repr(text) in str(refused.value)
