"""Bad input is one line on standard error, the right exit code, and every file as it was. A traceback is a bug."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_tune.cli import run as run_here
from mla_tune.policy.codec import load_policy
from tests.cli.conftest import SWEEP, contents

GOLDEN = Path(__file__).parents[1] / "policy" / "golden.yaml"
FLASH = ("--gpu", "cpu", "--model", "deepseek-v4-flash")
EXPORT = "db/cpu.jsonl"
PLACE = (*FLASH, "--site", "indexer_metadata")
NAMED = ("--policy", "policies/cpu.yaml", *PLACE)


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line of a command that must fail, print nothing else and change no file."""
    capsys.readouterr()
    before = contents(folder)
    code = run_here(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert captured.err.startswith("mla-tune: ")
    assert contents(folder) == before
    return code, captured.err.strip().removeprefix("mla-tune: ")


USAGE = {
    "unknown command": (["swep"], "No such command 'swep'"),
    "unknown subcommand": (["db", "drop"], "No such command 'drop'; see 'mla-tune db --help'"),
    "unknown option": ([*SWEEP, "--fast"], "No such option: --fast"),
    "option without value": (["sweep", "--gpu"], "'--gpu'"),
    "one argument too many": (["env", "now"], "unexpected extra argument"),
    "unknown gpu": (["sweep", "--gpu", "h300"], "got 'h300'; accepted: auto, cpu, h20, h100"),
    "empty gpu": (["lookup", "1", "1", "--model", "deepseek-v3.2", "--gpu", ""], "got ''; accepted: auto"),
    "unknown model": (["sweep", "--gpu", "cpu", "--model", "v4"], "got 'v4'; accepted: deepseek-v4-flash"),
    "unknown site": ([*SWEEP[:-1], "moe"], "got 'moe'; accepted: prefill_attention, indexer_metadata"),
    "zero budget": ([*SWEEP, "--budget", "0"], "positive number of seconds: got 0.0"),
    "negative budget": ([*SWEEP, "--budget=-1"], "got -1.0"),
    "endless budget": ([*SWEEP, "--budget", "inf"], "got inf"),
    "budget that is no number": ([*SWEEP, "--budget", "nan"], "got nan"),
    "budget in words": ([*SWEEP, "--budget", "ten"], "'--budget'"),
    "unknown regime": (["fit", "--gpu", "cpu", "--regime", "fast"], "got 'fast'; accepted: graph, eager"),
    "cap in parsecs": (["fit", "--gpu", "cpu", "--max-workspace-bytes", "3pc"], "got '3pc'; accepted: 536870912"),
    "cap of nothing": (["fit", "--gpu", "cpu", "--max-workspace-bytes", "0"], "positive number of bytes: got '0'"),
    "cap below nothing": (["fit", "--gpu", "cpu", "--max-workspace-bytes=-1MiB"], "got '-1MiB'; accepted"),
    "cap beyond 64 bits": (["fit", "--gpu", "cpu", "--max-workspace-bytes", "99999999999GiB"], "GiB'; accepted"),
    "unknown effort": ([*SWEEP, "--effort", "heroic"], "got 'heroic'; accepted: quick, default, full"),
    "validation of nothing": (["validate", "--gpu", "cpu", "--points", "0"], "got 0; accepted: 1 to 100000"),
    "validation without patience": (["validate", "--gpu", "cpu", "--timeout", "0"], "--timeout must be a positive"),
    "validation of an unknown model": (["validate", "--gpu", "cpu", "--model", "v4"], "got 'v4'; accepted: deepseek"),
    "unknown site of a lookup": (["lookup", "1", "1", *FLASH, "--site", "moe"], "got 'moe'; accepted: prefill"),
    "unknown kernel": (["tune", "--kernel", "gemm"], "got 'gemm'; accepted: dequantize_v4, dequantize_dsa"),
    "endless tuning": (["tune", "--budget", "inf"], "--budget must be a positive number of seconds: got inf"),
    "negative seed": (["tune", "--seed=-1"], "--seed must be a 32-bit number: got -1"),
    "unknown overlap": (
        [*SWEEP, "--overlap", "30"],
        "--overlap must be a known model: got 30; accepted: 0, 50, 80, 95",
    ),
    "unknown provider": (
        [*SWEEP, "--provider", "vllm"],
        "--provider must be a known one: got 'vllm'; accepted: own, sglang",
    ),
    "unknown layer": (["lookup", "1", "1", *PLACE, "--layer", "c5a"], "got 'c5a'; accepted: swa_only, c4a"),
    "layer of another model": (["lookup", "1", "1", *PLACE, "--layer", "dsa"], "got dsa; accepted: c4a"),
    "layer without an indexer": (["explain", "1", "1", *PLACE, "--layer", "c128a"], "got c128a; accepted: c4a"),
    "head count that is not padded": (["lookup", "1", "1", *FLASH, "--h-q", "16"], "got 16; accepted: 64"),
    "head count in words": (["lookup", "1", "1", *FLASH, "--h-q", "many"], "'--h-q'"),
    "no arguments": (["lookup"], "Missing"),
    "no context": (["lookup", "1", *PLACE], "context_tokens"),
    "no model": (["lookup", "1", "1", "--gpu", "cpu"], "'--model'"),
    "tokens in words": (
        ["lookup", "one", "1", *PLACE],
        "'query_tokens': a count must be a whole number below 2^63: got 'one'",
    ),
    "tokens in floating point": (["lookup", "1e3", "4096", *PLACE], "got '1e3'"),
    "zero tokens": (["lookup", "0", "10", *PLACE], "num_qo_tokens=0"),
    "negative tokens": (["lookup", *PLACE, "--", "-4", "10"], "got '-4'"),
    "negative tokens as an option": (["lookup", "-4", "10", *PLACE], "No such option: -4"),
    "more queries than context": (["lookup", "11", "10", *PLACE], "num_qo_tokens=11, kv_tokens=10"),
    "explain more queries than context": (["explain", "11", "10", *PLACE], "num_qo_tokens=11, kv_tokens=10"),
    "more requests than queries": (["explain", "4", "10", "--num-reqs", "5", *PLACE], "num_reqs=5"),
    "no requests": (["explain", "4", "10", "--num-reqs", "0", *PLACE], "num_reqs=0"),
    "import of nothing": (["db", "import"], "source"),
}


@pytest.mark.parametrize(("arguments", "said"), USAGE.values(), ids=USAGE)
def test_a_wrong_argument_is_named_with_what_is_accepted(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refusal(capsys, folder, *arguments)
    assert code == 2
    assert said.lower() in line.lower()


FAILURES = {
    "a gpu that is not in this machine": (["sweep", "--gpu", "b200"], "nvidia-b200 that is in this machine: found "),
    "verifying one": (["verify", "--gpu", "b200"], "accepted here: auto, "),
    "a gpu without a policy": (["policy", "show", "--gpu", "nvidia-l4"], "none is for nvidia-l4"),
    "a site that was not swept": (
        ["lookup", "1", "1", "--policy", "policies/cpu.yaml", *FLASH],
        "policies/cpu.yaml must have a table for prefill",
    ),
    "an explanation of one": (["explain", "1", "1", *FLASH], "policies/cpu.yaml must have a table for prefill"),
    "a policy that is not there": (["policy", "show", "--policy", "no.yaml"], "no.yaml: No such file"),
    "a folder as policy": (["policy", "show", "--policy", "db"], "db: Is a directory"),
    "a database as policy": (["policy", "show", "--policy", "db/cpu.db"], "db/cpu.db:"),
    "an export as policy": (["policy", "show", "--policy", "db/cpu.jsonl"], "db/cpu.jsonl"),
    "endless zeros as policy": (["policy", "show", "--policy", "/dev/zero"], "at most 262144 bytes"),
    "an export that is not there": (["fit", "--measurements", "no.jsonl"], "no.jsonl: No such file"),
    "a folder as export": (["fit", "--measurements", "db"], "db: Is a directory"),
    "a policy as export": (["fit", "--measurements", "policies/cpu.yaml"], "policies/cpu.yaml, line 1"),
    "an empty export": (["fit", "--measurements", "/dev/null"], "/dev/null, line 1"),
    "a regime that was not measured": (["fit", "--gpu", "cpu", "--regime", "graph"], "got graph, which none of"),
    "a traffic file that is not there": (["fit", "--gpu", "cpu", "--traffic", "no.jsonl"], "no.jsonl: No such file"),
    "a sweep by an export as traffic": ([*SWEEP, "--traffic", EXPORT], "db/cpu.jsonl:1: must be one line of a traffic"),
    "a missing export of an import": (["db", "import", "no.jsonl"], "no.jsonl: No such file"),
    "a missing export of an explanation": (["explain", "1", "1", *PLACE, "--measurements", "no"], "no: No such file"),
    "a database that is not there": (["db", "ls", "--db", "no.db"], "no file no.db"),
    "a folder as database": (["db", "ls", "--db", "policies"], "policies is not"),
    "a sweep into a folder": ([*SWEEP, "--db", "policies"], "policies is not"),
    "a policy as database": (["db", "ls", "--db", "policies/cpu.yaml"], "policies/cpu.yaml is not one"),
    "a device as database": ([*SWEEP, "--db", "/dev/null"], "/dev/null is not"),
    "a place without files": ([*SWEEP, "--db", "/proc/a.db"], "cannot write /proc/a.db.lock"),
    "a folder that cannot be made": ([*SWEEP, "--db", "/proc/no/a.db"], "folder that exists or can be made: /proc/no"),
    "a file as folder of a database": ([*SWEEP, "--db", "db/cpu.jsonl/a.db"], "db/cpu.jsonl: "),
    "a file as folder of an export": (["db", "export", "--gpu", "cpu", "--out", "db/cpu.db/a"], "db/cpu.db: "),
    "a file as folder of a policy": (["fit", "--gpu", "cpu", "--out", "db/cpu.db/a.yaml"], "db/cpu.db: "),
    "a folder as output of an export": (["db", "export", "--gpu", "cpu", "--out", "db"], "cannot write db"),
    "a folder as output of a fit": (["fit", "--gpu", "cpu", "--out", "policies"], "got policies"),
    "a device as output of a fit": (["fit", "--gpu", "cpu", "--out", "/dev/full"], "got /dev/full"),
    "an unwritable place for a fit": (["fit", "--gpu", "cpu", "--out", "/proc/a.yaml"], "got /proc/a.yaml"),
    "an unknown environment": (["db", "export", "--gpu", "cpu", "--environment", "0"], "got 0; accepted: "),
    "a policy for another gpu's measurements": (
        ["explain", "64", "4096", "--policy", str(GOLDEN), *FLASH[2:], "--layer", "c4a", "--measurements", EXPORT],
        "is for nvidia-h200, db/cpu.jsonl was measured on cpu",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), FAILURES.values(), ids=FAILURES)
def test_what_cannot_be_done_is_said_and_nothing_is_touched(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refusal(capsys, folder, *arguments)
    assert code == 1
    assert said in line


def test_a_command_group_alone_shows_its_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    for group in ([], ["db"], ["policy"]):
        assert run_here(group) == 2
        captured = capsys.readouterr()
        assert captured.out.startswith(" ".join(["Usage: mla-tune", *group]))
        assert captured.err == f"mla-tune: a command is missing; see '{' '.join(['mla-tune', *group])} --help'\n"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_noise(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


@pytest.mark.parametrize("harm", [cut, empty, fill_with_noise], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("db/cpu.jsonl", ["fit", "--gpu", "cpu"]),
        ("db/cpu.jsonl", ["db", "import", "db/cpu.jsonl", "--db", "copy.db"]),
        ("db/cpu.jsonl", ["explain", "4", "4000", *PLACE]),
        ("policies/cpu.yaml", ["policy", "show", "--policy", "policies/cpu.yaml"]),
        ("policies/cpu.yaml", ["lookup", "4", "4000", *NAMED]),
    ],
)
def test_a_damaged_file_is_named(
    name: str, arguments: list[str], harm: Callable[[Path], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(folder / name)
    code, line = refusal(capsys, folder, *arguments)
    assert code == 1
    assert name in line


@pytest.mark.parametrize("harm", [fill_with_noise, cut], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("arguments", [SWEEP, ("db", "ls", "--gpu", "cpu"), ("db", "export", "--gpu", "cpu")])
def test_a_damaged_database_is_named(
    arguments: tuple[str, ...], harm: Callable[[Path], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(folder / "db/cpu.db")
    code, line = refusal(capsys, folder, *arguments)
    assert code == 1
    assert "a measurement database must be" in line
    assert "db/cpu.db" in line


@pytest.mark.parametrize("arguments", [SWEEP, ("db", "ls", "--gpu", "cpu"), ("db", "import", "db/cpu.jsonl")])
def test_a_newer_database_asks_for_an_upgrade(
    arguments: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect("db/cpu.db")) as connection, connection:
        connection.execute(
            "insert into _sqlite_migrations (migration_set, name, applied_at) values ('mla_tune', 'm999_later', '')"
        )
    code, line = refusal(capsys, folder, *arguments)
    assert code == 1
    assert line.endswith("upgrade mla-tune")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema: 4\n", "schema: 5\n", "upgrade mla-tune"),
        ("schema: 4\n", "schema: one\n", "schema must be one that is read here: got 'one'"),
        ("evidence: measured\n", "evidence: measured\nauthor: me\n", "author"),
        ("regime: eager\n", "", "regime"),
        ("sm_count: ", "sm_count: x", "sm_count"),
        ("among: [deep_gemm, jit]", "among: [deep_gemm]", "must be a known one: got 'jit'"),
    ],
    ids=["newer", "no number", "unknown key", "missing key", "wrong type", "unknown candidate"],
)
def test_an_edited_policy_is_refused_with_its_line(
    old: str, new: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "policies/cpu.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    code, line = refusal(capsys, folder, "lookup", "4", "4000", *NAMED)
    assert code == 1
    assert line.startswith("policies/cpu.yaml:")
    assert said in line


@pytest.mark.parametrize("blocked", ["db", "policies"])
def test_a_file_in_the_place_of_an_output_folder_shows_before_the_sweep(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLA_TUNE_HOME", ".")
    (tmp_path / "db").mkdir()
    if blocked == "db":
        (tmp_path / "db").rmdir()
    (tmp_path / blocked).write_text("mine")
    code, line = refusal(capsys, tmp_path, *SWEEP)
    assert code == 1
    assert f"{blocked}: File exists" in line


def test_a_fit_that_fails_leaves_the_old_policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "db/cpu.jsonl").read_bytes().splitlines(keepends=True)
    without_judgement = [line for line in lines if b'"role":"held_out"' not in line]
    assert len(without_judgement) < len(lines)
    header = json.loads(without_judgement[0]) | {"points": len(without_judgement) - 1}
    without_judgement[0] = json.dumps(header).encode() + b"\n"
    (folder / "db/cpu.jsonl").write_bytes(b"".join(without_judgement))
    code, line = refusal(capsys, folder, "fit", "--gpu", "cpu")
    assert code == 1
    assert "held-out" in line
    assert load_policy("policies/cpu.yaml").tables


WORDS = (
    "lookup explain policy show db ls import fit env --gpu cpu h200 --model deepseek-v4-flash --json --policy "
    "policies/cpu.yaml --layer c4a --site indexer_metadata 1 -1 4096 999999999999999999999999 -- --h-q 64 --out = - é"
)
words = st.sampled_from([*WORDS.split(), "", "a b", "\udcff"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=st.lists(words | st.text(st.characters(exclude_characters="\0"), max_size=8), max_size=9))
def test_no_command_line_ends_in_a_traceback(
    arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_here(arguments)
    captured = capsys.readouterr()
    assert code in (0, 1, 2)
    assert captured.err.count("\n") == (code != 0)
