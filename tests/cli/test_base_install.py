"""What a server's container has: the base install, without torch, Optuna and whatever else only measuring needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mla_tune.cli.options import token_count
from mla_tune.errors import UsageError

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
        ("ensure", "--help"),
        ("trace-diff", "--help"),
        ("--help",),
    ],
    ids=" ".join,
)
def test_a_base_install_has_the_commands_that_a_container_needs(arguments: tuple[str, ...]) -> None:
    done = run_without_them(*arguments)
    assert (done.returncode, done.stderr) == (0, "")


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
