"""What lint finds: nothing in what is committed, each fault by its rule, and never a traceback."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_tune.cli.staleness import stale_builds
from mla_tune.policy.codec import EDITOR_LINE, dump_policy, load_policy, write_policy
from mla_tune.policy.evidence import PolicyEvidence, dump_evidence, evidence_path
from mla_tune.policy.lint import Finding, Severity, lint_policy
from mla_tune.policy.schema import Choice, Limit, Policy, Range, Row, Table
from mla_tune.policy.threshold import Threshold
from tests.policy.strategies import evidence, policies, policy, table
from tests.policy.test_policy_fuzz import FRAGMENTS, GOOD

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "policies").glob("*.yaml"))


def row(count: int, candidate: str = "sparse_fwd", **changes: Any) -> Row:
    """A row that takes ``candidate`` from ``count`` query tokens."""
    below = "with_kvcache" if candidate == "sparse_fwd" else "sparse_fwd"
    line = Choice(threshold=Threshold.level(count), candidate=candidate)
    return Row(choices=(Choice(candidate=below), line), **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with an export that a policy may name."""
    (tmp_path / "db").mkdir()
    (tmp_path / "policies").mkdir()
    (tmp_path / "db" / "nvidia-h200.jsonl").write_text("measurements\n")
    return tmp_path


def stored(folder: Path, of: Policy, stated: PolicyEvidence | None = None) -> Path:
    """``of`` where lint finds it, made of the export there, with its evidence beside it."""
    sha256 = hashlib.sha256((folder / "db" / "nvidia-h200.jsonl").read_bytes()).hexdigest()
    of = msgspec.structs.replace(of, source=msgspec.structs.replace(of.source, sha256=sha256))
    path = folder / "policies" / "nvidia-h200.yaml"
    write_policy(path, of, stated or evidence(*of.tables))
    return path


def messages(path: Path, severity: Severity = Severity.ERROR) -> list[str]:
    return [finding.message for finding in lint_policy(str(path)) if finding.severity is severity]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_policy_is_clean(path: Path) -> None:
    assert lint_policy(str(path)) == []
    assert [severity for severity, _ in stale_builds(load_policy(path)) if severity is Severity.ERROR] == []


def test_a_policy_that_was_written_by_mla_tune_is_clean(folder: Path) -> None:
    assert lint_policy(str(stored(folder, policy()))) == []


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        (
            table(rows=(row(900, "with_kvcache"),), limits=(Limit(candidate="with_kvcache", num_qo_tokens=899),)),
            "with_kvcache from 0 requests and 0 context must start below its limit: got 900; accepted: up to 899",
        ),
        (table(rows=(row(32769),)), "must start inside the measured query tokens: got 32769; accepted: up to 32768"),
        (
            table(rows=(row(64), row(64, kv_tokens_from=(1 << 26) + 1))),
            "must start inside the measured context: got more than 67108864",
        ),
        (table(rows=(row(64), row(64, num_reqs_from=65))), "must start inside the measured requests: got more than 64"),
        (
            table(limits=tuple(Limit(candidate=name, num_qo_tokens=7) for name in ("sparse_fwd", "with_kvcache"))),
            "a table must leave one candidate at every token count",
        ),
    ],
    ids=["limit", "query tokens", "context", "requests", "nothing runs"],
)
def test_what_nothing_reaches_is_an_error(made: Table, rule: str, folder: Path) -> None:
    found = messages(stored(folder, policy(made)))
    assert any(rule in message for message in found), found
    assert all("\n" not in message for message in found)


def test_a_slanted_threshold_counts_where_it_is_lowest(folder: Path) -> None:
    line = Threshold((100, 40_000), (2048, 1 << 26))
    rows = (Row(choices=(Choice(candidate="with_kvcache"), Choice(threshold=line, candidate="sparse_fwd"))),)
    assert messages(stored(folder, policy(table(rows=rows)))) == []


def edited(change: Callable[[str], str]) -> Callable[[Path], None]:
    """A change of the policy's text."""

    def apply(path: Path) -> None:
        path.write_text(change(path.read_text()))

    return apply


def with_evidence(of: PolicyEvidence) -> Callable[[Path], None]:
    """Other evidence that names the policy's bytes."""

    def apply(path: Path) -> None:
        evidence_path(path).write_bytes(dump_evidence(of, hashlib.sha256(path.read_bytes()).hexdigest()))

    return apply


def other_measurements(path: Path) -> None:
    (path.parent.parent / "db" / "nvidia-h200.jsonl").write_text("other measurements\n")


def no_measurements(path: Path) -> None:
    shutil.rmtree(path.parent.parent / "db")


def no_evidence(path: Path) -> None:
    evidence_path(path).unlink()


def broken_evidence(path: Path) -> None:
    evidence_path(path).write_text("{")


ERROR, WARNING = Severity.ERROR, Severity.WARNING


@pytest.mark.parametrize(
    ("spoil", "severity", "said"),
    [
        (edited(lambda text: text.replace("take: sparse_fwd", "take: sparse_bwd", 1)), ERROR, r"line \d+: tables\.pre"),
        (edited(lambda text: "schema: [\n"), ERROR, r"line 2: must be valid YAML"),
        (edited(lambda text: text.replace("schema: 4", "schema: 3")), ERROR, r"^schema must be one that is read here"),
        (edited(lambda text: text + "# more\n" * 400), ERROR, r"at most 400 lines, which a review takes in: got"),
        (edited(lambda text: text + f"# {'x' * 30_000}\n"), ERROR, r"at most 30000 bytes"),
        (edited(lambda text: text + f"# {'x' * 119}\n"), ERROR, r"line \d+: must have at most 120 columns: got 121"),
        (edited(lambda text: text.removeprefix(EDITOR_LINE)), WARNING, r"its first line must name the schema"),
        (edited(lambda text: text + "\n"), ERROR, r"must be the evidence of the policy beside it"),
        (with_evidence(evidence(table(), table(layer="c128a"))), ERROR, r"of its tables: got one of .*c128a"),
        (with_evidence(evidence(table(layer="c128a"))), ERROR, r"c4a: its evidence must agree with it: it has none"),
        (with_evidence(evidence(table(rows=(row(5),)))), ERROR, r"must agree with it: got rows"),
        (
            with_evidence(evidence(table(limits=(Limit(candidate="sparse_fwd", num_qo_tokens=9),)))),
            ERROR,
            r"got a limit of sparse_fwd at 9; accepted: none",
        ),
        (
            other_measurements,
            ERROR,
            r"must be made of db/nvidia-h200.jsonl as it is: .*; fit it again with `mla-tune fit",
        ),
        (no_measurements, WARNING, r"its measurements are not here to compare: db/nvidia-h200.jsonl"),
        (no_evidence, WARNING, r"no nvidia-h200.evidence.json beside it"),
        (broken_evidence, ERROR, r"its evidence must be readable and its own"),
        (lambda path: path.rename(path.with_name("mine.yaml")), WARNING, "got mine.yaml; accepted: nvidia-h200.yaml"),
        (lambda path: path.unlink(), ERROR, "No such file or directory"),
    ],
)
def test_each_fault_is_found_in_one_line(
    spoil: Callable[[Path], object], severity: Severity, said: str, folder: Path
) -> None:
    path = stored(folder, policy())
    spoil(path)
    renamed = path.with_name("mine.yaml")
    path = renamed if renamed.exists() else path
    found = lint_policy(str(path))
    assert [of for of in found if of.severity is severity and re.search(said, of.message)], found
    assert all(str(of).startswith(f"{path}: {of.severity}: ") and "\n" not in str(of) for of in found)


def test_an_edited_file_is_told_from_a_generated_one(folder: Path) -> None:
    path = stored(folder, policy())
    path.write_text(path.read_text().replace("Generated, do not edit.", "Edited."))
    with_evidence(evidence())(path)
    assert messages(path, WARNING) == [
        "line 2: is not as mla-tune writes it: the file was edited, or is another release's"
    ]


def test_a_table_without_measured_range_around_its_rows_is_still_read(folder: Path) -> None:
    narrow = Range(num_qo_tokens=(5000, 6000), kv_tokens=(1 << 20, 1 << 21), num_reqs=(1, 1))
    assert any("must start inside" in message for message in messages(stored(folder, policy(table(measured=narrow)))))


def test_a_build_that_is_installed_otherwise_is_an_error_and_a_missing_one_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((severity, said),) = stale_builds(policy())
    assert (severity, said) == (
        WARNING,
        "not installed here, so whether tables are stale is not known: sgl-flash-mla==1.0.0",
    )
    (tmp_path / "sgl_flash_mla-1.1.0.dist-info").mkdir()
    (tmp_path / "sgl_flash_mla-1.1.0.dist-info" / "METADATA").write_text("Name: sgl-flash-mla\nVersion: 1.1.0\n")
    (tmp_path / "flash_mla").mkdir()
    (tmp_path / "flash_mla" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    ((severity, said),) = stale_builds(policy())
    assert severity is ERROR
    assert said == ("1 tables, or candidates of theirs, do not serve here: sgl-flash-mla must be 1.0.0: got 1.1.0")


def one_line_each(found: list[Finding]) -> None:
    for of in found:
        assert str(of).isprintable()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(FRAGMENTS) | st.binary(max_size=4)),
        min_size=1,
        max_size=3,
    ),
    beside=st.sampled_from([b"", b"{}", b"\xff", dump_evidence(evidence(), "0" * 64)]),
)
def test_a_mutated_policy_never_gives_a_traceback(
    edits: list[tuple[int, int, bytes]], beside: bytes, tmp_path: Path
) -> None:
    data = GOOD
    for start, removed, inserted in edits:
        data = data[:start] + inserted + data[start + removed :]
    path = tmp_path / "nvidia-h200.yaml"
    path.write_bytes(data)
    evidence_path(path).write_bytes(beside)
    one_line_each(lint_policy(str(path), stale_builds))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(original=policies())
def test_any_valid_policy_is_linted(original: Policy, tmp_path: Path) -> None:
    path = tmp_path / "nvidia-h200.yaml"
    path.write_bytes(dump_policy(original))
    one_line_each(lint_policy(str(path), stale_builds))
