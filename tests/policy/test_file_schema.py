"""The published schema: it is the one that the code makes, it accepts what is read, and it says what every field is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings

from mla_tune.policy.codec import EDITOR_LINE, SCHEMA_FILE, dump_policy
from mla_tune.policy.file_schema import dump_json_schema, policy_json_schema
from mla_tune.policy.schema import Policy
from mla_tune.policy.strict_yaml import read_yaml
from tests.policy.strategies import full_policy, policies, policy

FOLDER = Path(__file__).parents[2] / "policies"
COMMITTED = sorted(FOLDER.glob("*.yaml"))
SCHEMA = msgspec.json.decode(dump_json_schema())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def as_editor(text: str) -> Any:
    """The document as an editor's validator sees it: keys are strings."""
    return msgspec.json.decode(msgspec.json.encode(read_yaml(text, "test")[0]))


def test_the_committed_schema_is_the_generated_one() -> None:
    written = (FOLDER / SCHEMA_FILE).read_bytes()
    assert written == dump_json_schema(), "make it again: mla-tune policy schema --out policies/policy.schema.json"


def test_it_is_a_json_schema_and_says_of_every_field_what_it_is() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    parts = policy_json_schema()["$defs"]
    fields = [(name, key, field) for name, part in parts.items() for key, field in part.get("properties", {}).items()]
    assert len(fields) > 40
    assert [(name, key) for name, key, field in fields if not field.get("description")] == []
    assert not [name for name in parts if name.startswith("_")]
    assert b":class:" not in dump_json_schema()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_policy_fits_the_schema_that_its_first_line_names(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(EDITOR_LINE)
    assert (path.parent / EDITOR_LINE.strip().partition("$schema=")[2]).is_file()
    assert [error.message for error in VALIDATOR.iter_errors(as_editor(text))] == []


@settings(max_examples=100, deadline=None)
@given(policies())
def test_what_is_written_fits_the_schema(original: Policy) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(as_editor(dump_policy(original).decode()))] == []


def test_a_table_for_every_site_and_engine_fits_the_schema() -> None:
    VALIDATOR.validate(as_editor(dump_policy(full_policy()).decode()))


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("take: with_kvcache", "take: with_kvcash", "take"),
        ("models: [deepseek-v4-flash]", "models: [deepseek-v9]", "models"),
        ("layers: [c4a]", "layers: [c4b]", "layers"),
        ("evidence: measured", "evidence: guessed", "evidence"),
        ("query_tokens_from: 4096", "query_tokens_from: many", "query_tokens_from"),
        ("{1M: 6000, 64M: 12000}", "{1M: 6000, 64M: 12000, 65M: 1}", "query_tokens_from"),
        ("context_from: 1M", "context_from: 1G", "context_from"),
        ("requests_from: 16", "requests_form: 16", "choices"),
        ("schema: 4", "schema: 5", "schema"),
        ("sgl-flash-mla==1.0.0", "sgl-flash-mla>=1.0.0", "builds"),
    ],
)
def test_a_slip_is_marked_where_it_is(before: str, after: str, place: str) -> None:
    text = dump_policy(policy()).decode()
    assert before in text
    found = list(VALIDATOR.iter_errors(as_editor(text.replace(before, after, 1))))
    assert found
    assert {place} & {step for error in found for step in error.absolute_path}
