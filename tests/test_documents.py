"""What README, the README files beside the code and scripts/examples say can be typed as it stands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mla_tune.cli import run
from mla_tune.cli.app import app
from mla_tune.runtime import Dispatcher
from mla_tune.runtime.switches import Switches
from mla_tune.sites.candidates import CANDIDATES
from mla_tune.sites.site import SiteName
from tests.checkout import ROOT
from tests.fenced_lines import fenced

DOCUMENTS = sorted(
    path
    for path in (ROOT / "README.md", *(path for folder in ("mla_tune", "policies", "db", "scripts", "tests")
                                       for path in (ROOT / folder).rglob("README.md")))
)  # fmt: skip

PARSED_ONLY = {
    "ensure": "needs the GPU that will serve",
    "sweep": "measures for minutes (--dry-run is run)",
    "probe": "measures",
    "tune": "measures",
    "validate": "measures",
    "verify": "compares every candidate, for minutes without a GPU; tests/cli runs it",
    "fit": "fits for minutes; test_artefacts.py runs it",
    "model": "fits for minutes; test_modelled.py runs it",
    "report": "needs the extra of that name; tests/report runs it",
    "trace": "records for seconds; tests/trace does",
    "trace-diff": "needs traces; tests/trace runs the lines of its README",
}
"""Commands whose lines are parsed by the real command line and not run, and why."""

Words = tuple[str, ...]


def own_command(line: str) -> Words | None:
    """The arguments that a line of a shell gives to mla-tune; None for any other line."""
    words = shlex.split(line.removeprefix("$ "), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    for start in ("mla-tune", "./scripts/run"):
        if words[:1] == [start] and len(words) > 1:
            return tuple(words[1:])
    return None


def commands_of(document: Path) -> list[Words]:
    lines = fenced(document.read_text(), "", "bash")
    return [words for line in lines if (words := own_command(line)) is not None]


def inline_commands(document: Path) -> list[Words]:
    """Commands within a sentence or a table, which may leave out what a command needs."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = (span.replace("\n", " ").replace("\\|", "|") for span in re.findall(r"`([^`]+)`", prose))
    return [words for span in spans if (words := own_command(span)) is not None]


EVERY = [(path, words) for path in DOCUMENTS for words in commands_of(path)]
RUN = list(dict.fromkeys(words for _, words in EVERY if words[0] not in PARSED_ONLY or "--dry-run" in words))


def leaf(words: Words) -> tuple[Any, list[str]]:
    """The command that ``words`` begin with, and what follows. Raises ``KeyError`` for one that is not there."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    return command, rest


def options(command: Any) -> set[str]:
    return {"--help", *(option for parameter in command.params for option in parameter.opts)}


@pytest.mark.parametrize(
    ("document", "words"), EVERY, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_command_in_a_block_is_one_that_the_command_line_takes(document: Path, words: Words) -> None:
    command, rest = leaf(words)
    command.make_context(words[0], rest)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of policies and exports alone, to run commands in."""
    for name in ("policies", "db"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.db*"))
    shutil.copy(ROOT / "tests" / "replay" / "conversation.jsonl", tmp_path / "requests.jsonl")
    for line in (("init", "-q"), ("add", "."), ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t")):
        subprocess.run(["git", *line], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_every_command_that_needs_no_gpu_runs(words: Words, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "db" and words[1] != "import":  # a reader has imported before
        assert run(["db", "import", "db/nvidia-h100.jsonl", "--db", "h100.db"]) == 0
    files = [sorted(map(str, folder.glob(word))) if "*" in word else [word] for word in words]
    assert (
        run([str(Path(name).relative_to(folder)) if name.startswith("/") else name for of in files for name in of]) == 0
    )
    assert capsys.readouterr().out.strip()


def test_commands_are_run_and_each_exception_is_of_use() -> None:
    assert len(RUN) >= 8
    assert {words[0] for _, words in EVERY} >= set(PARSED_ONLY)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_sentence_names_options_that_exist(document: Path) -> None:
    for words in inline_commands(document):
        if words[0] in ("COMMAND", "..."):
            continue
        command, rest = leaf(words)
        named = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert named <= options(command), words


def test_the_list_of_commands_is_complete() -> None:
    def leaves(command: Any, name: str = "") -> Iterator[str]:
        for word, found in getattr(command, "commands", {}).items():
            yield from leaves(found, f"{name}{word} ") if hasattr(found, "commands") else [f"{name}{word}"]

    text = (ROOT / "mla_tune" / "cli" / "README.md").read_text()
    listed = re.findall(r"^\| `mla-tune ([a-z -]+?)(?: --.*?)?` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(leaves(typer.main.get_command(app)))


def test_readme_is_150_lines_at_most_and_no_sentence_runs_past_a_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if not line.startswith("|") and len(line) > 125] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_script_and_test_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")):
            assert (document.parent / target).exists(), target
    for script in re.findall(r"(?<![\w/])(?:\./)?(scripts/[\w./-]+[\w-])", text):
        assert (ROOT / script).exists(), script
    tests = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in source for source in tests.values()), name


def test_every_variable_that_a_server_reads_is_explained_and_no_other() -> None:
    stated = set(re.findall(r"^\| `(MLA_TUNE_\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    read = re.findall(
        r'^\w+_VARIABLE = "(MLA_TUNE_\w+)"',
        "".join(path.read_text() for path in (ROOT / "mla_tune").rglob("*.py")),
        re.MULTILINE,
    )
    assert stated == set(read)
    names = {name for path in DOCUMENTS for name in re.findall(r"MLA_TUNE_[A-Z_]*[A-Z]", path.read_text())}
    scripts = {"MLA_TUNE_CACHE", "MLA_TUNE_SKIP_ENGINES", "MLA_TUNE_NEWEST_ENGINES"}
    assert names <= stated | scripts
    Switches.from_environment({"MLA_TUNE_MODE": "pin:with_kvcache", "MLA_TUNE_RANKS": "incumbent"})


def test_the_program_for_a_server_runs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    program = "\n".join(fenced((ROOT / "mla_tune" / "runtime" / "README.md").read_text(), "python"))
    names: dict[str, Any] = {}
    exec(compile(program, "README", "exec"), names)
    assert isinstance(names["dispatcher"], Dispatcher)
    site = names["site"]
    assert site.choose(8192, 131072, 1) in {candidate.name for candidate in CANDIDATES[SiteName.PREFILL_ATTENTION]}


def shell_of(path: Path) -> list[str]:
    """The shell programs in a file: the file itself, a Dockerfile's instructions, or the steps of a workflow."""
    text = path.read_text()
    if path.name.startswith("Dockerfile"):
        lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
        words = dict.fromkeys(line.split()[0] for line in lines)
        assert set(words) <= {"ARG", "FROM", "RUN", "ENV", "VOLUME", "ENTRYPOINT", "COPY", "WORKDIR"}
        started = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT ")]
        (entry,) = started
        assert entry[:2] == ["bash", "-c"]
        return [entry[2], *(line.removeprefix("RUN ") for line in lines if line.startswith("RUN "))]
    if path.suffix in (".yml", ".yaml"):
        jobs = yaml.safe_load(text).get("jobs", {})
        return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    return [text] if text.startswith("#!/usr/bin/env bash") else []


SHELL = sorted(
    path for folder in ("scripts", "scripts/examples") for path in (ROOT / folder).glob("*") if path.is_file()
)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_every_script_and_example_is_one_that_the_shell_and_the_command_line_take(path: Path) -> None:
    if path.read_text().startswith("#!"):
        assert os.access(path, os.X_OK) or path.suffix == ".py"
    for program in shell_of(path):
        subprocess.run(["bash", "-n"], input=program, text=True, check=True)
        if path.parent.name == "examples":
            for line in re.findall(r"^(?:exec )?(mla-tune [a-z][^;&|>\n]*)", program, re.MULTILINE):
                words = own_command(line)
                assert words is not None
                command, rest = leaf(words)
                command.make_context(words[0], [word.replace("$GITHUB_RUN_NUMBER", "1") for word in rest])


def test_the_container_measures_what_is_missing_and_passes_its_arguments_on(tmp_path: Path) -> None:
    for name in ("mla-tune", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    (line,) = re.findall(r"^ENTRYPOINT (.*)", (ROOT / "scripts" / "examples" / "Dockerfile").read_text(), re.MULTILINE)
    done = subprocess.run(
        [*json.loads(line), "--model-path", "a b"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "mla-tune ensure --engine sglang",
        "python -m sglang.launch_server --host 0.0.0.0 --model-path a b",
    ]
