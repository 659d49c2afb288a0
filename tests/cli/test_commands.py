"""The commands on the results of one real sweep: what they write, what they print, and that it all fits together."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mla_tune import __version__
from mla_tune.cli import run as run_here
from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.evidence import load_evidence
from mla_tune.runtime import Dispatcher
from mla_tune.sites.candidates import CANDIDATES
from mla_tune.sites.shape import Shape
from mla_tune.store.database import Database
from mla_tune.store.export import read_export, write_export
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Outcome
from tests.cli.conftest import SWEEP, Swept, contents
from tests.command import ENVIRONMENT, run

POLICY, EXPORT, DATABASE = Path("policies/cpu.yaml"), Path("db/cpu.jsonl"), Path("db/cpu.db")
PLACE = ("--gpu", "cpu", "--site", "indexer_metadata", "--model", "deepseek-v4-flash")


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a command printed; it must succeed and keep standard error empty."""
    capsys.readouterr()
    code = run_here([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    return json.loads(output(capsys, *arguments, "--json"))


def commands_after(text: str, word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in text.splitlines() if line.startswith(word)]


def test_a_sweep_writes_database_export_and_policy_and_nothing_else(swept: Swept) -> None:
    assert swept.result.returncode == 0, swept.result.stderr
    assert set(contents(swept.folder)) == {
        *("db", "policies", str(POLICY.with_suffix(".evidence.json"))),
        *map(str, (POLICY, EXPORT, DATABASE)),
    }


def test_a_sweep_prints_its_table_the_policys_path_and_what_it_did(swept: Swept) -> None:
    out, err = swept.result.stdout, swept.result.stderr
    assert "indexer_metadata" in out
    assert f"policy written to {POLICY}\n" in out
    (summary,) = (line for line in err.splitlines() if "points measured" in line)
    assert summary.endswith(f"0 worker restarts; stored in {DATABASE}")
    assert "Traceback" not in out + err


def test_the_command_that_a_sweep_prints_next_works_as_it_stands_where_the_sweep_ran(swept: Swept) -> None:
    (command,) = commands_after(swept.result.stdout, "next:")
    result = subprocess.run(command, shell=True, cwd=swept.folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "choice: " in result.stdout


def test_a_second_sweep_measures_nothing_and_leaves_the_same_export_and_policy(folder: Path) -> None:
    before = contents(folder)
    result = run(folder, *SWEEP, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert (answer["measured"], answer["left"], answer["restarts"]) == (0, 0, 0)
    assert answer["known"] > 0
    assert answer["policy"]["path"] == str(POLICY)
    after = contents(folder)
    assert {name: after[name] for name in (str(EXPORT), str(POLICY))} == {
        name: before[name] for name in (str(EXPORT), str(POLICY))
    }


def test_a_fit_rebuilds_the_same_bytes_by_the_command_that_the_policy_names(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = POLICY.read_bytes()
    _, *arguments = shlex.split(load_policy(POLICY).source.command)
    POLICY.unlink()
    output(capsys, *arguments)
    assert POLICY.read_bytes() == before
    output(capsys, "fit", "--gpu", "cpu")
    assert POLICY.read_bytes() == before


def test_a_fit_of_an_export_elsewhere_prints_commands_that_work(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = Path("other place/of a run.jsonl"), Path("out of it/a policy.yaml")
    source.parent.mkdir()
    shutil.move(EXPORT, source)
    printed = output(capsys, "fit", "--measurements", source, "--out", target)
    (command,) = commands_after(printed, "next:")
    words = shlex.split(command)
    assert "choice: " in output(capsys, *words[words.index("explain") :])
    before = target.read_bytes()
    output(capsys, *shlex.split(load_policy(target).source.command)[1:])
    assert target.read_bytes() == before


def test_lookup_explain_and_the_runtime_give_one_answer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = Dispatcher.load(POLICY).resolve("indexer_metadata", model="deepseek-v4-flash", layer="c4a")
    for tokens, kv_tokens in ((1, 1), (16, 4096), (700, 8192), (16384, 32768), (1 << 40, 1 << 41)):
        query = (str(tokens), str(kv_tokens), *PLACE, "--layer", "c4a")
        expected = resolved.choose(tokens, kv_tokens, 1)
        assert f"\nchoice: {expected}, because: " in output(capsys, "lookup", *query)
        assert as_json(capsys, "lookup", *query)["candidate"] == expected
        explained = as_json(capsys, "explain", *query)
        assert explained["decision"]["candidate"] == expected
        assert {candidate["candidate"] for candidate in explained["candidates"]} == {"deep_gemm", "jit"}
        assert f"choice: {expected}, because: " in output(capsys, "explain", *query)


def test_json_of_a_policy_is_the_policy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, fitted = as_json(capsys, "policy", "show", "--gpu", "cpu"), as_json(capsys, "fit", "--gpu", "cpu")
    assert shown.pop("answered_by")["policy"] == str(POLICY)
    assert shown == fitted
    policy = load_policy(POLICY)
    assert [table["layer"] for table in shown["tables"]] == [table.layer for table in policy.tables]
    assert shown["source"]["command"] == policy.source.command


def test_a_shown_policy_has_its_provenance_and_every_rule(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = " ".join(output(capsys, "policy", "show", "--gpu", "cpu", "--all").split())
    policy = load_policy(POLICY)
    assert policy.source.sha256[:12] in printed
    assert policy.source.command in printed
    stated = load_evidence(POLICY, digest(POLICY.read_bytes()))
    assert stated is not None
    for table in stated.tables:
        for rule in table.held_out.slowdown:
            assert rule.rule in printed


def test_an_export_goes_through_a_new_database_unchanged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_export(EXPORT).measurements
    imported = output(capsys, "db", "import", EXPORT, "--db", "new/copy.db")
    assert imported == f"{len(rows)} of {len(rows)} measurements, tries and launches were new: new/copy.db\n"
    assert output(capsys, "db", "import", EXPORT, "--db", "new/copy.db").startswith(f"0 of {len(rows)} ")
    assert output(capsys, "db", "export", "--gpu", "cpu", "--db", "new/copy.db", "--out", "x/y.jsonl") == "x/y.jsonl\n"
    assert Path("x/y.jsonl").read_bytes() == EXPORT.read_bytes()


def test_the_tries_of_an_export_alone_can_be_taken_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_export(EXPORT)
    tries = (Try(found.measurements[0].site, "sparse_fwd", Shape(1, 7, 7), Outcome.CRASH, "died"),)
    write_export(Path("tried.jsonl"), found.environment, found.measurements, tries)
    said = output(capsys, "db", "import", "tried.jsonl", "--only-tries", "--db", "new/tries.db")
    assert said == "1 of 1 measurements, tries and launches were new: new/tries.db\n"
    with Database.open(Path("new/tries.db"), create=False) as database:
        assert database.tries(found.environment.id) == list(tries)
        assert database.measurements(found.environment.id) == []


def test_a_database_is_listed_with_its_outcomes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (listed,) = as_json(capsys, "db", "ls", "--gpu", "cpu")
    with Database.open(DATABASE, create=False) as database:
        (summary,) = database.summaries()
    assert listed["environment"]["sku"] == "cpu"
    assert listed["points"] == summary.points
    assert listed["outcomes"] == [[str(outcome), count] for outcome, count in summary.outcomes]
    assert summary.environment.id in output(capsys, "db", "ls", "--gpu", "cpu")
    assert output(capsys, "db", "export", "--gpu", "cpu", "--environment", summary.environment.id) == f"{EXPORT}\n"


def test_a_dry_run_counts_the_points_of_a_sweep_and_writes_nothing(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLA_TUNE_HOME", ".")
    plan = as_json(capsys, *SWEEP, "--dry-run")
    assert f"{plan['points']} points measured" in swept.result.stderr
    assert sum(row["points"] for row in plan["plan"]) == plan["points"]
    assert f"{plan['points']} points, about " in output(capsys, *SWEEP, "--dry-run")
    assert contents(tmp_path) == {}


def test_a_budget_that_ends_early_says_what_is_left_and_another_run_goes_on(tmp_path: Path) -> None:
    first = run(tmp_path, *SWEEP, "--budget", "0.000001", "--no-fit", "--json")
    answer = json.loads(first.stdout)
    assert (first.returncode, answer["policy"]) == (0, None)
    assert answer["measured"] <= 1
    assert answer["left"] > 0
    second = run(tmp_path, *SWEEP)
    assert (second.returncode, second.stderr.count("points measured")) == (0, 1)
    assert f"{answer['left']} points measured" in second.stderr
    assert f", {answer['measured']} known before" in second.stderr
    assert (tmp_path / POLICY).is_file()


def test_a_machine_without_a_gpu_has_nothing_to_tune_and_says_so_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path, "tune", "--gpu", "cpu")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("nothing to tune: ")
    assert result.stdout.count("\n") == 1
    assert run(tmp_path, "tune", "--gpu", "cpu", "--json").stdout == "[]\n"
    assert contents(tmp_path) == {}


def test_verify_compares_every_candidate_of_a_site(tmp_path: Path) -> None:
    arguments = ("verify", "--gpu", "cpu", "--model", "deepseek-v3.2")
    result = run(tmp_path, *arguments, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    checks = json.loads(result.stdout)
    assert {check["outcome"] for check in checks} == {"ok"}
    assert {check["candidate"] for check in checks} == {
        candidate.name for found in CANDIDATES.values() for candidate in found
    }
    assert contents(tmp_path) == {}


def test_the_environment_is_printed_with_its_id(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "env")
    assert found["torch"]
    assert found["sku"] in output(capsys, "env")


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "-h"], ["db", "--help"], ["policy", "show", "--help"]])
def test_help_is_on_standard_output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, *arguments).startswith("Usage: mla-tune")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--version") == f"mla-tune {__version__}\n"


def test_a_path_that_is_no_text_can_be_used_and_shown(folder: Path) -> None:
    result = run(folder, "db", "import", EXPORT, "--db", os.fsdecode(b"\xff.db"), PYTHONIOENCODING="utf-8")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("measurements, tries and launches were new: \\udcff.db\n")


def test_output_in_ascii_is_readable_too(folder: Path) -> None:
    for arguments in (("policy", "show", "--gpu", "cpu"), ("db", "ls", "--gpu", "cpu")):
        result = run(folder, *arguments, PYTHONIOENCODING="ascii")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.isascii()
