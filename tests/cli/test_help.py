"""What a user finds without a document: help with examples and plain words, completion, and errors that show the value."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from mla_tune.cli import run as run_here
from mla_tune.cli.app import app
from mla_tune.sites.site import MODELS


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Path of every command below ``command``."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path
        return
    for name in below:
        yield from commands(below[name], *path, name)


COMMANDS = [" ".join(path) for path in commands(typer.main.get_command(app))]


def help_of(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_here([*command.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_80_columns_and_names_types_in_words(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, monkeypatch, capsys)
    assert max(map(len, text.splitlines())) <= 80
    heads = re.findall(r"^  (?:-\S+(?:, --\S+)*|[A-Z]\S*) ?(\S*)", text, re.MULTILINE)
    assert [head for head in heads if re.search(r"[<\[]|^(TEXT|INTEGER|FLOAT|PATH)$", head)] == []


def example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    text = " ".join(help_of(command, monkeypatch, capsys).partition("Options:")[0].partition("Arguments:")[0].split())
    found = re.search(r"Example: mla-tune (.*)$", text)
    assert found, f"mla-tune {command} --help has no example"
    return shlex.split(found[1])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_that_its_options_accept(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = example(command, monkeypatch, capsys)
    length = len(command.split())
    assert " ".join(words[:length]) == command
    found: Any = typer.main.get_command(app)
    for name in words[:length]:
        found = found.commands[name]
    found.make_context(command, words[length:])  # raises for what it does not accept


READ_WRONGLY = {
    "a number of seconds": (["sweep", "--budget", "ten"], "Invalid value for '--budget': it must be a number: got 'ten'"),
    "a count": (["validate", "--points", "many"], "whole number below 2^63: got 'many'"),
    "a fraction as a count": (["trace-diff", "a", "b", "--top", "1.5"], "it must be a whole number: got '1.5'"),
    "tokens": (["lookup", "one", "1", "--model", "x"], "got 'one'"),
    "an engine": (["lookup", "1", "1", "--model", "x", "--engine", "tgi"], "got 'tgi'; accepted: sglang, "),
    "names of a diff": (["trace-diff", "a", "b", "--top", "all"], "it must be a whole number: got 'all'"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), READ_WRONGLY.values(), ids=READ_WRONGLY)
def test_a_value_that_cannot_be_read_is_shown_with_what_it_must_be(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def completed(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: str = "bash"
) -> list[str]:
    """What a shell offers for the last word of ``words``."""
    monkeypatch.setenv("_MLA_TUNE_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    assert run_here([]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("mla-tune swe", ["sweep"]),
        ("mla-tune trace", ["trace", "trace-diff"]),
        ("mla-tune policy s", ["show", "schema"]),
        ("mla-tune sweep --eff", ["--effort"]),
        ("mla-tune sweep --model ", list(MODELS)),
        ("mla-tune explain 1 1 --layer c", ["c4a", "c128a"]),
        ("mla-tune lookup 1 1 --gpu h20", ["h20", "h200"]),
        ("mla-tune lookup 1 1 --engine v", ["vllm", "vllm-few-heads"]),
        ("mla-tune lookup --zzz", []),
    ],
)
def test_a_shell_completes_commands_options_and_values(
    words: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = completed(words, monkeypatch, capsys)
    assert set(offered) <= set(found)
    last = words.split(" ")[-1]
    assert all(entry.startswith(last) for entry in found)
    assert bool(found) == bool(offered)


def test_the_script_for_a_shell_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(["--show-completion", "bash"]) == 0
    assert "_MLA_TUNE_COMPLETE=complete_bash" in capsys.readouterr().out
    assert "_MLA_TUNE_COMPLETE" not in os.environ
