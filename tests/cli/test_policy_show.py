"""``policy show``: one screen, whole names at every width, and the same choices as the table itself."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings

from mla_tune.cli import run
from mla_tune.cli.output.policy_output import ShownPolicy, in_words, policy_csv, policy_text
from mla_tune.errors import PolicyError
from mla_tune.policy.codec import digest, load_policy
from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import load_evidence
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.candidates import CANDIDATES
from mla_tune.sites.engines import Engine
from tests.policy.strategies import full_policy, policies

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "policies").glob("*.yaml"))
NAMES = {candidate.name for found in CANDIDATES.values() for candidate in found}


def shown(path: Path, *, everything: bool = False) -> ShownPolicy:
    """A committed policy with its evidence."""
    sha256 = digest(path.read_bytes())
    stated = load_evidence(path, sha256)
    return ShownPolicy(load_policy(path), f"policies/{path.name}", sha256, stated, everything=everything)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_policy_is_one_screen_with_head_and_verdict(path: Path) -> None:
    lines = policy_text(shown(path), 80)
    assert len(lines) <= 42
    policy = load_policy(path)
    heads = [line.split("  ")[0] for line in lines[:8] if re.match(r"[a-zA-Z]+ {2,}", line)]
    assert heads[:7] == ["GPU", "policy", "provider", "evidence", "builds", "context", "date"]
    assert lines[0].startswith(f"GPU       {policy.gpu.sku}")
    last = max(number for number, line in enumerate(lines) if not line.startswith(" "))
    assert lines[last].startswith("verdict   ")
    text = " ".join(lines)
    assert {table.model for table in policy.tables} <= set(re.findall(r"[\w.-]+", text))


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_width_holds_whole_names(path: Path, everything: bool, width: int) -> None:
    lines = policy_text(shown(path, everything=everything), width)
    longest_word = max(len(word) for line in lines for word in line.split())
    assert max(map(len, lines)) <= max(width, longest_word + 10)
    text = "\n".join(lines)
    assert "…" not in text
    mentioned = set(re.findall(r"\b(?:sparse_fwd|with_kvcache|deep_gemm|jit)\w*", text))
    assert mentioned <= NAMES
    tables = shown(path, everything=everything).tables
    taken = {choice.candidate for table in tables for row in table.rows for choice in row.choices}
    assert not everything or taken <= mentioned


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_the_counts_in_words_are_the_tables_own(path: Path) -> None:
    checked = 0
    for table in load_policy(path).tables:
        found = re.fullmatch(r"(\w+) from ((?:\d+ at \d+[KM](?:, )?)+), else (\w+)(?: \(.*\))?", in_words(table))
        for count, context in re.findall(r"(\d+) at (\d+[KM])", found[2]) if found else ():
            kv_tokens = int(context[:-1]) << (20 if context.endswith("M") else 10)
            choose, least = Decision(table).choose, int(count)
            assert found is not None
            assert choose(least, kv_tokens, 1) == found[1]
            assert choose(least - 1, kv_tokens, 1) == found[3]
            checked += 1
    assert checked


def test_every_row_of_a_layer_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "policies" / "nvidia-h200.yaml"
    arguments = ["policy", "show", "--policy", str(path), "--model", "deepseek-v4-flash", "--layer", "c128a"]
    assert run(arguments) == 0
    text = capsys.readouterr().out
    (table,) = [
        t
        for t in load_policy(path).tables
        if (t.model, t.layer, t.engine) == ("deepseek-v4-flash", "c128a", Engine.SGLANG)
    ]
    assert len(re.findall(r"^  from \d+ requests, ", text, re.MULTILINE)) == len(table.rows)
    assert "limit: with_kvcache up to 65903 query tokens, fails at " in text
    assert "held out: takes " in text
    assert "deepseek-v4-pro" not in text


def test_what_is_piped_is_plain_and_follows_the_columns_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in ("60", "120"):
        monkeypatch.setenv("COLUMNS", width)
        assert run(["policy", "show", "--policy", str(ROOT / "policies" / "nvidia-h100.yaml")]) == 0
        text = capsys.readouterr().out
        assert text.isascii()
        assert "\x1b" not in text
        assert 50 < max(map(len, text.splitlines())) <= int(width) or len(str(ROOT)) > 40


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_csv_has_every_choice_with_plain_numbers(path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(policy_csv(shown(path, everything=True)))))
    expected = [
        (
            table.site,
            table.model,
            str(table.engine),
            table.layer,
            choice.candidate,
            str(choice.threshold.num_qo_tokens[0]),
        )
        for table in load_policy(path).tables
        for row in table.rows
        for choice in row.choices
    ]
    keys = ("site", "model", "engine", "layer", "take", "query_tokens_from")
    assert [tuple(row[key] for key in keys) for row in rows] == expected
    assert all(row["context_from"].isdigit() for row in rows)


def test_json_of_one_model_has_its_tables_alone(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "policies" / "nvidia-h200.yaml"
    assert run(["policy", "show", "--policy", str(path), "--model", "deepseek-v3.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {table["model"] for table in found["tables"]} == {"deepseek-v3.2"}
    assert len(found["tables"]) == sum(table.model == "deepseek-v3.2" for table in load_policy(path).tables)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layer", "c5a"), "--model and --layer must name tables of "),
        (
            ("--model", "deepseek-v4-flash", "--layer", "dsa"),
            "got deepseek-v4-flash and dsa; accepted: deepseek-v4-flash (",
        ),
        (("--model", "deepseek-v9"), "deepseek-v9"),
        (("--csv", "--json"), "printed in one form: got --csv and --json"),
    ],
)
def test_what_no_table_is_for_is_refused_in_one_line(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "policies" / "nvidia-h200.yaml"
    assert run(["policy", "show", "--policy", str(path), *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def _decides(table: Table) -> bool:
    try:
        Decision(table)
    except PolicyError:
        return False
    return True


@settings(max_examples=40, deadline=None)
@given(policies())
def test_any_policy_can_be_shown_at_any_width(original: Policy) -> None:
    if not all(map(_decides, original.tables)):
        return
    for everything in (False, True):
        for width in (60, 160):
            assert policy_text(ShownPolicy(original, "p.yaml", everything=everything), width)
    assert policy_csv(ShownPolicy(original, "p.yaml", everything=True)).count("\n") > len(original.tables)


def test_a_table_for_every_site_and_engine_can_be_shown() -> None:
    lines = policy_text(ShownPolicy(full_policy(), "p.yaml"), 80)
    assert any("in vllm" in line for line in lines)
