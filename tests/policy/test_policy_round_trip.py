"""A policy survives its file, and equal policies make equal files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import PolicyError
from mla_tune.policy.codec import EDITOR_LINE, digest, dump_policy, load_policy, parse_policy, write_policy
from mla_tune.policy.evidence import load_evidence
from mla_tune.policy.schema import Ineligible, Policy
from mla_tune.policy.search import packaged_policies
from mla_tune.policy.strict_yaml import read_yaml
from tests.policy.strategies import MODELLED, evidence, full_policy, modelled_policy, policies, policy, table

GOLDEN = Path(__file__).with_name("golden.yaml")


@settings(max_examples=150, deadline=None)
@given(policies())
def test_parsing_what_was_dumped_gives_the_same_policy_and_dumping_that_the_same_bytes(original: Policy) -> None:
    data = dump_policy(original)
    again = parse_policy(data, "test")
    assert again == original
    assert dump_policy(again) == data


@settings(max_examples=50, deadline=None)
@given(policies())
def test_any_yaml_reader_sees_the_values_that_we_see(original: Policy) -> None:
    data = dump_policy(original)
    assert yaml.safe_load(data) == read_yaml(data.decode(), "test")[0]


def test_the_file_looks_as_reviewed() -> None:
    assert dump_policy(policy(), evidence()).decode() == GOLDEN.read_text()


def test_a_choice_takes_one_line_and_tables_that_agree_stand_once() -> None:
    whole = full_policy()
    lines = [line.strip() for line in dump_policy(whole).decode().splitlines()]
    keys = ("model", "h_q", "layer")
    alike = {msgspec.structs.replace(t, **dict.fromkeys(keys)): t for t in whole.tables}
    entries = [line for line in lines if line.startswith("- for: ")]
    assert len(alike) <= len(entries) < len(whole.tables)  # more than one where keys are no product
    assert sum("take: " in line for line in lines) == sum(line.startswith("- {") and "take: " in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_a_threshold_is_written_at_named_contexts_and_served_exactly_there() -> None:
    text = dump_policy(policy()).decode()
    assert "- {context_from: 1M, take: sparse_fwd, query_tokens_from: {1M: 6000, 64M: 12000}}" in text
    (served,) = parse_policy(text.replace("64M: 12000", "60M: 12007").encode(), "test").tables
    line = served.rows[1].choices[1].threshold
    assert (line.at(1 << 20), line.at(60 << 20)) == (6000, 12007)


@given(st.integers(0, 2**63 - 1) | st.integers(0, 2**20).map(lambda count: count << 10))
def test_context_tokens_are_written_exactly(count: int) -> None:
    changed = msgspec.structs.replace(table().rows[1], kv_tokens_from=max(count, 1))
    rows = (table().rows[0], msgspec.structs.replace(changed, choices=table().rows[0].choices))
    written = policy(table(rows=rows))
    assert parse_policy(dump_policy(written), "test") == written


def test_a_modelled_policy_warns_in_its_first_lines() -> None:
    first = dump_policy(modelled_policy(), evidence(modelled=MODELLED)).decode().splitlines()[1:3]
    assert first[0] == "# mla-tune: what serves on nvidia-b200, 148 SMs. Generated, do not edit."
    assert first[1].startswith("# WARNING: modelled, not measured")
    assert "nvidia-h200" in first[1]


def test_a_measured_policy_has_no_word_of_a_model() -> None:
    assert b"modelled" not in dump_policy(policy(), evidence())


@pytest.mark.parametrize("path", sorted(packaged_policies().values(), key=str), ids=lambda path: path.name)
def test_a_shipped_policy_fits_a_review(path: Path) -> None:
    data = path.read_bytes()
    lines = data.decode().splitlines()
    editor, *head = [line for line in lines if line.startswith("#")]
    assert len(lines) <= 400
    assert len(data) <= 30_000
    assert max(map(len, lines)) <= 120
    assert len(head) <= 21  # 20 is the goal: a modelled head has its warning besides
    assert lines[: len(head) + 1] == [editor, *head]
    assert f"{editor}\n" == EDITOR_LINE  # for the editor, not to be read


def test_evidence_stands_beside_its_policy_and_is_refused_beside_another(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200.yaml"
    write_policy(path, policy(), evidence())
    beside = tmp_path / "nvidia-h200.evidence.json"
    assert sorted(tmp_path.iterdir()) == [beside, path]
    assert load_evidence(path, digest(path.read_bytes())) == evidence()
    with pytest.raises(PolicyError, match="must be the evidence of the policy beside it"):
        load_evidence(path, "0" * 64)
    for broken in (b"", b"{}", b"\xff", beside.read_bytes()[:-9]):
        beside.write_bytes(broken)
        with pytest.raises(PolicyError, match=r"^[^\n]*must be the evidence of a policy[^\n]*$"):
            load_evidence(path, digest(path.read_bytes()))
    beside.unlink()
    assert load_evidence(path, digest(path.read_bytes())) is None


def test_a_written_file_loads_and_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200.yaml"
    write_policy(path, full_policy())
    assert load_policy(path) == full_policy()
    assert digest(path.read_bytes()) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_invalid_policy_is_not_written_and_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200.yaml"
    path.write_text("old")
    with pytest.raises(PolicyError, match=r"tables\.prefill_attention\[0\]"):
        write_policy(path, policy(table(incumbent="jit")))
    slow = Ineligible(candidate="with_kvcache", first_call_s=float("nan"))
    with pytest.raises(PolicyError, match="finite"):
        write_policy(path, policy(table(ineligible=(slow,))))
    with pytest.raises(PolicyError, match="one line of printable characters"):
        write_policy(path, policy(table(model="two\nlines")))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"^a policy file must be writable: .*No such file"):
        write_policy(tmp_path / "missing" / "x.yaml", policy())


@pytest.mark.parametrize("path", ["missing.yaml", ".", "nul\0byte.yaml"])
def test_a_file_that_cannot_be_read_is_one_line(path: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"^a policy file must be readable: [^\n]*; check the path$"):
        load_policy(f"{tmp_path}/{path}")


def test_the_pure_python_parser_reads_and_refuses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_tune.policy.strict_yaml._LOADER", yaml.BaseLoader)
    data = dump_policy(policy())
    line = data[: data.index(b"regime:")].count(b"\n") + 1
    assert parse_policy(data, "p.yaml") == policy()
    with pytest.raises(PolicyError, match=rf"^p\.yaml:{line}: regime must be a known one: got 'cold'"):
        parse_policy(data.replace(b"regime: graph", b"regime: cold"), "p.yaml")
    with pytest.raises(PolicyError, match=r"^p\.yaml: must be valid YAML: [^\n]*special characters are not allowed"):
        parse_policy(data.replace(b"graph", b"\x01"), "p.yaml")
