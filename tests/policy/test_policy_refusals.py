"""What a policy file may not hold, and that the error says where, what, and what to do."""

from __future__ import annotations

import re

import pytest

from mla_tune.errors import PolicyError
from mla_tune.policy.codec import MAX_POLICY_BYTES, dump_policy, parse_policy
from mla_tune.policy.file_form import SCHEMA_VERSION
from tests.policy.strategies import policy

GOOD = dump_policy(policy()).decode()
SCHEMA = f"schema: {SCHEMA_VERSION}"
CHOICE_0 = "tables.prefill_attention[0].choices[0]"


def refusal(text: str | bytes) -> str:
    """The one-line error of a file with ``text``."""
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(PolicyError) as caught:
        parse_policy(data, "p.yaml")
    message = str(caught.value)
    assert message.startswith("p.yaml")
    assert message.isprintable()
    return message


def changed(old: str, new: str) -> str:
    """The good file with one text replaced."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


@pytest.mark.parametrize(
    "scalar",
    [
        *("1e3", "1E3", "0o17", "0x1F", "017", "1_000", "+1", "1.", ".5", "1.5e3", ".nan", ".inf", "-.INF", "~", ""),
        *("yes", "No", "on", "OFF", "y", "N", "True", "FALSE", "Null", "12:30:45", "2024-01-01", "1.0.0", "=", "<<"),
    ],
)
def test_a_scalar_that_yaml_versions_read_differently_is_no_number(scalar: str) -> None:
    message = refusal(changed("sm_count: 132", f"sm_count: {scalar}"))
    line = GOOD[: GOOD.index("sm_count")].count("\n") + 1
    assert message.startswith(f"p.yaml:{line}: gpu.sm_count does not fit schema")
    assert "Expected `int`, got " in message


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            changed("\nevidence: measured", "\nevidence: &a measured").replace("regime: graph", "regime: *a"),
            "aliases are not accepted",
        ),
        (changed("regime: graph", "regime: *a"), "must be valid YAML: found undefined alias"),
        (changed("regime: graph", "regime: !!int 1"), "tags are not accepted: got 'tag:yaml.org,2002:int'"),
        (changed("regime: graph", "regime: !x graph"), "tags are not accepted: got '!x'"),
        (changed("regime: graph", "regime: !!python/name:os.system x"), "tags are not accepted"),
        (changed("regime: graph", "regime: graph\nregime: graph"), "keys must occur once in a mapping: got 'regime'"),
        (changed("regime: graph", "1: graph"), "Expected `str`"),
        (changed("regime: graph", "null: graph"), "Expected `str`"),
        (changed("regime: graph", "[a]: graph"), "nesting must be at most"),
        (changed("regime: graph", 'regime: "a\\nb"'), "strings must be one line of printable characters"),
        (changed("measurements: 1234", "measurements: 9223372036854775808"), "must be at least 1 and fit in 64 bits"),
        (changed("measurements: 1234", "measurements: " + "1" * 5000), "Expected `int`, got `str`"),
        (changed("regime: graph", "regime: " + "[" * 20 + "]" * 20), "nesting must be at most 16 levels"),
        (GOOD + "---\na: 1\n", "must be valid YAML: but found another document"),
        ("# nothing\n", "must hold one YAML document: got an empty file"),
        ("", "must hold one YAML document: got an empty file"),
        ("- 1\n", "must be a mapping with the keys of a policy: got [1]"),
        ("a: [1\n", "must be valid YAML"),
        ("a: 'b\n", "must be valid YAML"),
        ("a: \0\n", "must be valid YAML"),
        (b"a: \xff\n", "must be UTF-8: got byte 0xff"),
        ("#" * (MAX_POLICY_BYTES + 1), f"must be at most {MAX_POLICY_BYTES} bytes"),
    ],
)
def test_yaml_beyond_the_subset_is_refused(text: str | bytes, rule: str) -> None:
    assert rule in refusal(text)


@pytest.mark.parametrize("schema", [SCHEMA_VERSION + 1, 99])
def test_a_newer_schema_asks_for_an_upgrade_even_if_it_has_keys_that_we_do_not_know(schema: int) -> None:
    message = refusal(changed(SCHEMA, f"schema: {schema}\nnew_key: 1"))
    assert f"got {schema}; mla-tune " in message
    assert message.endswith(f"reads schema {SCHEMA_VERSION}; upgrade mla-tune")


@pytest.mark.parametrize("schema", ["schema: 0", "schema: 2", "schema: first", "x: 1", "schema: [1]", "schema: true"])
def test_any_other_schema_says_the_command_that_makes_the_file_again(schema: str) -> None:
    said = refusal(changed(SCHEMA, schema))
    assert said.endswith("; make it again from its measurements with `mla-tune fit --gpu h200`")
    without = refusal(f"{schema}\ntables: []\n")
    assert without.endswith(f"reads schema {SCHEMA_VERSION}; rebuild the file with `mla-tune fit`")


CHOICES = GOOD[GOOD.index("        - {take: with_kvcache}\n") :]
TABLE = GOOD[GOOD.index("  prefill_attention:\n") :]
ENTRY = GOOD[GOOD.index("    - for: ") :]
MEASURED = "      choices:\n"
RISING = "{1M: 6000, 64M: 12000}"


@pytest.mark.parametrize(
    ("old", "new", "place", "rule"),
    [
        ("sm_count: 132", "sm_count: true", "gpu.sm_count", "Expected `int`, got `bool`"),
        ("regime: graph", "regime: 1", "regime", "Expected `str`, got `int`"),
        ("regime: graph", "", "the file", "Object missing required field `regime`"),
        ("regime: graph", "regime: graph\nother: 1", "the file", "Object contains unknown field `other`"),
        ("sm_count: 132", "sm_count: 0", "gpu.sm_count", "must be at least 1 and fit in 64 bits: got 0"),
        ("sku: nvidia-h200", 'sku: "../x"', "gpu.sku", "must be a canonical SKU name: got '../x'"),
        ("\nevidence: measured", "\nevidence: guessed", "evidence", "got 'guessed'; accepted: measured, modelled"),
        ("\nevidence: measured", "\nevidence: modelled", "scaled_from", "exactly where evidence is modelled: got None"),
        ("regime: graph", "regime: cold", "regime", "got 'cold'; accepted: graph, eager"),
        ("- name: sgl-flash-mla", '- name: ""', "environment.libraries[0].name", "distribution name"),
        ("measurements: 1234", "measurements: 0", "source.measurements", "must be at least 1"),
        (f"tables:\n{TABLE}", "tables: {}\n", "tables", "at least one table"),
        (ENTRY, ENTRY + ENTRY, "tables.prefill_attention[0]", "must not repeat an earlier entry"),
        ("  prefill_attention:", "  lm_head:", "tables", "Object contains unknown field `lm_head`"),
        (
            "models: [deepseek-v4-flash]",
            "models: [gpt]",
            "tables.prefill_attention[0]",
            "accepted: deepseek-v4-flash, ",
        ),
        ("layers: [c4a]", "layers: [dsa]", "tables.prefill_attention[0]", "accepted: swa_only, c4a, c128a, forward"),
        (
            "layers: [c4a]",
            "layers: [c4a], engine: tgi",
            "tables.prefill_attention[0].for.engine",
            "Invalid enum value 'tgi'",
        ),
        ("layers: [c4a]", "layers: [c4a], engine: vllm", "tables.prefill_attention[0]", "got 'vllm'; accepted: sglang"),
        (
            "fwd, with_kvcache]",
            "fwd, with_kvcache_mixed]",
            "tables.prefill_attention[0]",
            "accepted: sparse_fwd, with_kv",
        ),
        ("heads: [64]", "heads: [32]", "tables.prefill_attention[0]", "got 32; accepted: 64"),
        ("heads: [64], ", "", "tables.prefill_attention[0]", "got None; accepted: 64"),
        ("[sparse_fwd, with_kvcache]", "[]", "tables.prefill_attention[0]", "at least one"),
        (
            "[sparse_fwd, with_kvcache]",
            "[sparse_fwd, jit]",
            "tables.prefill_attention[0]",
            "accepted: sparse_fwd, with_kv",
        ),
        ("[sparse_fwd, with_kvcache]", "[sparse_fwd, sparse_fwd]", "tables.prefill_attention[0]", "must not repeat"),
        (
            "[sparse_fwd, with_kvcache]",
            "[with_kvcache]",
            "tables.prefill_attention[0]",
            "got 'sparse_fwd'; accepted: with_kv",
        ),
        (
            "query_tokens: [16, 32768]",
            "query_tokens: [0, 5]",
            "tables.prefill_attention[0]",
            "1 <= low <= high: got [0, 5]",
        ),
        ("context: [2K, 64M]", "context: [9, 8]", "tables.prefill_attention[0]", "1 <= low <= high: got [9, 8]"),
        (
            "context: [2K, 64M]",
            "context: [2k, 64M]",
            "common.measured.context",
            "got '2k'; accepted: 1280, 80K, 64M",
        ),
        ("context: [2K, 64M]", "context: [2K, 0.5M]", "common.measured.context", "got '0.5M'; accepted: 1280"),
        (
            MEASURED,
            f"      limits: {{jit: 1}}\n{MEASURED}",
            "tables.prefill_attention[0]",
            "accepted: sparse_fwd, with_kv",
        ),
        (MEASURED, f"      limits: {{sparse_fwd: -1}}\n{MEASURED}", "tables.prefill_attention[0]", "at least 0"),
        (
            MEASURED,
            f"      slow_first_call_s: {{sparse_fwd: 2.0}}\n{MEASURED}",
            "tables.prefill_attention[0]",
            "accepted: with_kv",
        ),
        (MEASURED, f"      slow_first_call_s: {{with_kvcache: 2.0}}\n{MEASURED}", CHOICE_0, "accepted: sparse_fwd"),
        (f"choices:\n{CHOICES}", "choices: []\n", "tables.prefill_attention[0]", "at least one row"),
        ("{take: with_kvcache}", "{context_from: 1, take: with_kvcache}", CHOICE_0, "must be 0 on the first"),
        ("{take: with_kvcache}", "{requests_from: 1, take: with_kvcache}", CHOICE_0, "must be 0 on the first"),
        (
            "requests_from: 16, take",
            "requests_from: 16, context_from: 5, take",
            "tables.prefill_attention[0].choices[4]",
            "must be 0",
        ),
        ("take: sparse_fwd, query", "take: jit, query", "tables.prefill_attention[0].choices[1]", "got 'jit'"),
        (
            "take: sparse_fwd, query",
            "take: with_kvcache, query",
            "tables.prefill_attention[0].choices[1]",
            "must differ",
        ),
        (
            "{take: with_kvcache}",
            "{take: with_kvcache, query_tokens_from: 7}",
            CHOICE_0,
            "must be 0 on the first choice",
        ),
        ("query_tokens_from: 4096", "query_tokens_from: -1", "tables.prefill_attention[0].choices[1]", "got -1"),
        (
            ", query_tokens_from: 4096",
            "",
            "tables.prefill_attention[0].choices[1]",
            "must be 0 on the first choice of a row",
        ),
        (RISING, "{1M: 6000}", "tables.prefill_attention[0].choices[3].query_tokens_from", "two rising counts"),
        (
            RISING,
            "{1M: 6000, 64M: 5000}",
            "tables.prefill_attention[0].choices[3].query_tokens_from",
            "two rising counts",
        ),
        (
            RISING,
            "{64M: 6000, 1M: 12000}",
            "tables.prefill_attention[0].choices[3].query_tokens_from",
            "two rising contexts",
        ),
        (
            RISING,
            "{1M: 6000, 2M: 7000, 64M: 12000}",
            "tables.prefill_attention[0].choices[3].query_tokens_from",
            "two rising",
        ),
        (
            RISING,
            "{1M: 6000, many: 12000}",
            "tables.prefill_attention[0].choices[3].query_tokens_from",
            "got 'many'; accepted: 1280",
        ),
        (
            RISING,
            "{1M: 6000, 64M: 12e3}",
            "tables.prefill_attention[0].choices[3].query_tokens_from",
            "Expected `int`, got `str`",
        ),
    ],
)
def test_a_broken_rule_names_its_place_value_and_next_step(old: str, new: str, place: str, rule: str) -> None:
    message = refusal(changed(old, new))
    assert re.match(rf"p\.yaml:\d+: {re.escape(place)}(?![\w.])", message)
    assert rule in message
    assert message.endswith("; rebuild the file with `mla-tune fit`")


def test_thresholds_that_pass_each_other_inside_their_row_are_refused() -> None:
    third = changed(
        RISING, "{1M: 6000, 64M: 12000}}\n        - {context_from: 1M, take: with_kvcache, query_tokens_from: 9000"
    )
    assert "must start above the choice before it" in refusal(third)


def test_the_line_is_that_of_the_choice_in_the_file() -> None:
    message = refusal(changed("take: sparse_fwd, query_tokens_from: {1M", "take: jit, query_tokens_from: {1M"))
    line = GOOD[: GOOD.index("query_tokens_from: {1M")].count("\n") + 1
    assert message.startswith(f"p.yaml:{line}: tables.prefill_attention[0].choices[3] ")


def test_an_unreadable_byte_is_reported_with_its_line() -> None:
    line = GOOD[: GOOD.index("regime: graph")].count("\n") + 1
    said = refusal(GOOD.encode().replace(b"regime: graph", b"regime: \xc3"))
    assert said.startswith(f"p.yaml:{line}: must be UTF-8")
