"""What a policy file may not hold, and that the error says where, what, and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mla_tune.errors import PolicyError
from mla_tune.policy.schema import MAX_POLICY_BYTES, dump_policy, parse_policy
from tests.policy.strategies import modelled_policy, policy, table

GOOD = dump_policy(policy()).decode()


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
def test_a_plain_scalar_that_yaml_versions_read_differently_is_refused_with_line_and_column(scalar: str) -> None:
    message = refusal(changed("noise_band: 0.03", f"noise_band: {scalar}"))
    line = GOOD[: GOOD.index("noise_band")].count("\n") + 1
    assert re.match(rf"p\.yaml:{line}:\d+: plain values must read the same in every YAML version: got ", message)
    assert repr(scalar) in message


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (changed("\nevidence: measured", "\nevidence: &a measured"), "anchors are not accepted: got '&a'"),
        (changed("regime: graph", "regime: *a"), "aliases are not accepted: got '*a'"),
        (changed("regime: graph", "regime: !!str graph"), "tags are not accepted: got 'tag:yaml.org,2002:str'"),
        (changed("regime: graph", "regime: ! graph"), "tags are not accepted: got '!'"),
        (changed("regime: graph", "regime: !!python/name:os.system x"), "tags are not accepted"),
        (changed("regime: graph", "regime: graph\nregime: graph"), "keys must occur once in a mapping: got 'regime'"),
        (changed("regime: graph", "1: graph"), "keys must be strings: got 1"),
        (changed("regime: graph", "null: graph"), "keys must be strings: got None"),
        (changed("regime: graph", "[a]: graph"), "keys must be strings: got ['a']"),
        (changed("regime: graph", 'regime: "a\\nb"'), "strings must be one line of printable characters"),
        (changed("measurements: 1234", "measurements: 9223372036854775808"), "integers must fit in 64 bits"),
        (changed("measurements: 1234", "measurements: " + "1" * 5000), "integers must fit in 64 bits"),
        (changed("regime: graph", "regime: " + "[" * 20 + "]" * 20), "nesting must be at most 16 levels"),
        (GOOD + "---\na: 1\n", "must hold one YAML document: got another"),
        ("%YAML 1.1\n---\n" + GOOD, "directives (%...) are not accepted"),
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


@pytest.mark.parametrize("schema", ["4", "99"])
def test_a_newer_schema_asks_for_an_upgrade_even_if_it_has_keys_that_we_do_not_know(schema: str) -> None:
    message = refusal(changed("schema: 3", f"schema: {schema}\nnew_key: 1"))
    assert f"got {schema}; mla-tune " in message
    assert message.endswith("reads schema 3; upgrade mla-tune")


@pytest.mark.parametrize("schema", ["schema: 0", "schema: 2", "schema: first", "x: 1", "schema: [1]"])
def test_any_other_schema_asks_for_a_rebuild(schema: str) -> None:
    assert refusal(changed("schema: 3", schema)).endswith("reads schema 3; rebuild the file with `mla-tune fit`")


ROWS = GOOD[GOOD.index("      - num_reqs_from: 0\n") : GOOD.index("    held_out:")]
TABLE = GOOD[GOOD.index("  - site:") :]
LIMIT = "limits:\n      - {{candidate: {}, num_qo_tokens: {}, fails_at: {}, found_by: sweep, reason: x}}"
SLOW = "ineligible:\n      - {{candidate: {}, first_call_s: {}, bound_s: {}}}"
ROW = "tables[0].rows[0]"
ROW_3 = "tables[0].rows[2].kv_tokens_from"
CHOICES = f"{ROW}.choices"


@pytest.mark.parametrize(
    ("old", "new", "place", "rule"),
    [
        ("sm_count: 132", "sm_count: true", "gpu.sm_count", "Expected `int`, got `bool` (True)"),
        ("regime: graph", "regime: 1", "regime", "Expected `str`, got `int` (1)"),
        ("regime: graph", "", "the file", "Object missing required field `regime`"),
        ("regime: graph", "regime: graph\nother: 1", "the file", "Object contains unknown field `other`"),
        ("sm_count: 132", "sm_count: 0", "gpu.sm_count", "must be at least 1 and fit in 64 bits: got 0"),
        (
            "\ntables:",
            "\nobjective: {traffic: abc, forwards: 0, uniform_share: 0.1}\ntables:",
            "objective.traffic",
            "must be a SHA-256 in hexadecimal: got 'abc'",
        ),
        (
            "\ntables:",
            f"\nobjective: {{traffic: {'a' * 64}, forwards: 1, uniform_share: 0.0}}\ntables:",
            "objective.uniform_share",
            "must be a share in (0, 1]: got 0.0",
        ),
        (
            "    noise_band:",
            "    workspace_cap: {max_bytes: 0, shapes: 3, over: 2, exempt: 1}\n    noise_band:",
            "tables[0].workspace_cap.max_bytes",
            "must be at least 1 and fit in 64 bits: got 0",
        ),
        (
            "    noise_band:",
            "    workspace_cap: {max_bytes: 9, shapes: 3, over: 1, exempt: 2}\n    noise_band:",
            "tables[0].workspace_cap",
            "must count 0 <= exempt <= over <= shapes: got exempt 2, over 1, shapes 3",
        ),
        ("sku: nvidia-h200", 'sku: "../x"', "gpu.sku", "must be a canonical SKU name: got '../x'"),
        ("\nevidence: measured", "\nevidence: guessed", "evidence", "got 'guessed'; accepted: measured, modelled"),
        ("regime: graph", "regime: cold", "regime", "got 'cold'; accepted: graph, eager"),
        ("- {name: sgl-flash-mla", '- {name: ""', "environment.libraries[0].name", "distribution name"),
        ("measurements: 1234", "measurements: 0", "source.measurements", "must be at least 1"),
        (f"tables:\n{TABLE}", "tables: []\n", "tables", "at least one table"),
        (TABLE, TABLE + TABLE, "tables[1]", "must not repeat an earlier entry"),
        ("site: prefill_attention", "site: lm_head", "tables[0].site", "accepted: prefill_attention, indexer_metadata"),
        ("model: deepseek-v4-flash", "model: gpt", "tables[0].model", "accepted: deepseek-v4-flash, "),
        ("layer: c4a", "layer: dsa", "tables[0].layer", "accepted: swa_only, c4a, c128a, forward"),
        ("layer: c4a", "layer: c4a\n    engine: tgi", "tables[0].engine", "Invalid enum value 'tgi' ('tgi')"),
        ("layer: c4a", "layer: c4a\n    engine: vllm", "tables[0].engine", "got 'vllm'; accepted: sglang"),
        ("fwd, with_kvcache]", "fwd, with_kvcache_mixed]", "tables[0].candidates[1]", "accepted: sparse_fwd, with_kv"),
        ("h_q: 64", "h_q: 32", "tables[0].h_q", "got 32; accepted: 64"),
        ("h_q: 64", "h_q: null", "tables[0].h_q", "got None; accepted: 64"),
        ("[sparse_fwd, with_kvcache]", "[]", "tables[0].candidates", "at least one"),
        (
            "[sparse_fwd, with_kvcache]",
            "[sparse_fwd, jit]",
            "tables[0].candidates[1]",
            "accepted: sparse_fwd, with_kv",
        ),
        ("[sparse_fwd, with_kvcache]", "[sparse_fwd, sparse_fwd]", "tables[0].candidates[1]", "must not repeat"),
        ("[sparse_fwd, with_kvcache]", "[with_kvcache]", "tables[0].incumbent", "got 'sparse_fwd'; accepted: with_kv"),
        ("noise_band: 0.03", "noise_band: 1.0", "tables[0].noise_band", "in [0, 1): got 1.0"),
        ("noise_band: 0.03", "noise_band: 1" + "0" * 400 + ".0", "tables[0].noise_band", "got inf"),
        ("[16, 32768]", "[0, 5]", "tables[0].measured.num_qo_tokens", "1 <= low <= high: got [0, 5]"),
        ("[2048, 67108864]", "[9, 8]", "tables[0].measured.kv_tokens", "1 <= low <= high: got [9, 8]"),
        ("limits: []", LIMIT.format("jit", 1, 2), "tables[0].limits[0].candidate", "accepted: sparse_fwd, with_kv"),
        ("limits: []", LIMIT.format("sparse_fwd", 5, 5), "tables[0].limits[0].fails_at", "at least 6"),
        ("limits: []", LIMIT.format("sparse_fwd", -1, 5), "tables[0].limits[0].num_qo_tokens", "at least 0"),
        (
            "ineligible: []",
            SLOW.format("sparse_fwd", 2.0, 1.0),
            "tables[0].ineligible[0].candidate",
            "accepted: with_kv",
        ),
        ("ineligible: []", SLOW.format("with_kvcache", 1.0, 1.0), "tables[0].ineligible[0].first_call_s", "above"),
        ("ineligible: []", SLOW.format("with_kvcache", 2.0, 1.0), f"{CHOICES}[0].candidate", "accepted: sparse_fwd"),
        (f"rows:\n{ROWS}", "rows: []\n", "tables[0].rows", "at least one row"),
        ("kv_tokens_from: 0", "kv_tokens_from: 1", "tables[0].rows[0].kv_tokens_from", "must be 0 on the first"),
        ("kv_tokens_from: 1048576", "kv_tokens_from: 0", "tables[0].rows[1].kv_tokens_from", "before it (0): got 0"),
        ("num_reqs_from: 0", "num_reqs_from: 1", "tables[0].rows[0].num_reqs_from", "must be 0 on the first"),
        (
            "num_reqs_from: 16\n        kv_tokens_from: 0",
            "num_reqs_from: 16\n        kv_tokens_from: 5",
            ROW_3,
            "must be 0",
        ),
        ("num_reqs_from: 16", "num_reqs_from: 0", ROW_3, "must be above the entry before it (1048576): got 0"),
        ("censored: above", "censored: aside", "tables[0].rows[2].censored", "accepted: above, below"),
        (
            f"{ROWS}",
            f"{ROWS}".replace("choices", "censored: above\n        choices", 1),
            f"{ROW}.censored",
            "2 choices",
        ),
        ("num_qo_tokens_from: 0", "num_qo_tokens_from: 7", f"{CHOICES}[0].num_qo_tokens_from", "must be 0"),
        ("num_qo_tokens_from: 4096", "num_qo_tokens_from: -1", f"{CHOICES}[1].num_qo_tokens_from", "got -1"),
        ("candidate: sparse_fwd, b", "candidate: jit, b", f"{CHOICES}[1].candidate", "got 'jit'"),
        ("candidate: sparse_fwd, b", "candidate: with_kvcache, b", f"{CHOICES}[1].candidate", "must differ"),
        ("[0.95, 1.05]", "[0.95]", f"{CHOICES}[1].bracket", "length 2, got 1 ([0.95])"),
        ("[0.95, 1.05]", "[1.05, 0.95]", f"{CHOICES}[1].bracket", "0 <= low <= 1 <= high: got [1.05, 0.95]"),
        ("[0.98, 1.1]", "[1.01, 1.1]", "tables[0].rows[1].choices[1].interval", "got [1.01, 1.1]"),
        ("[0.02, 0.03]", "[-1.5, 0.03]", "tables[0].rows[1].choices[1].win", "above -1: got [-1.5, 0.03]"),
        ("to: 12000", "to: 0", "tables[0].rows[1].choices[1].num_qo_tokens_to", "num_qo_tokens_from=6000"),
        (
            "candidate: with_kvcache}",
            "candidate: with_kvcache, bracket: [1.0, 1.0]}",
            f"{CHOICES}[0].bracket",
            "absent",
        ),
        ("points: 40", "points: 0", "tables[0].held_out.points", "at least 1"),
        ("rule: policy", "rule: other", "tables[0].held_out.slowdown", "must have the rule 'policy'"),
        ("geomean: 1.01", "geomean: 0.99", "tables[0].held_out.slowdown[0].geomean", "at least 1.0: got 0.99"),
    ],
)
def test_a_broken_rule_names_its_place_value_and_next_step(old: str, new: str, place: str, rule: str) -> None:
    message = refusal(changed(old, new))
    assert re.match(rf"p\.yaml:\d+: {re.escape(place)} ", message)
    assert rule in message
    assert message.endswith("; rebuild the file with `mla-tune fit`")


MODELLED_GOOD = dump_policy(modelled_policy()).decode()


@pytest.mark.parametrize(
    ("old", "new", "place", "rule"),
    [
        ("\nevidence: modelled", "\nevidence: measured", "modelled", "exactly where evidence is modelled: got it"),
        ("relative: 0.5", "relative: -0.5", "tables[0].uncertainty[1].relative", "at least 0: got -0.5"),
        ("relative: 0.5", "relative: 1" + "0" * 400 + ".0", "tables[0].uncertainty[1].relative", "got inf"),
        ("{candidate: with_kvcache, rel", "{candidate: jit, rel", "tables[0].uncertainty[1].candidate", "got 'jit'"),
        ("{candidate: with_kvcache, rel", "{candidate: sparse_fwd, rel", "tables[0].uncertainty[1]", "not repeat"),
        ("scaled: 0.25", "scaled: -0.25", "modelled.stages[0].scaled", "at least 0: got -0.25"),
        ("measured: 0.02", "measured: -0.02", "modelled.stages[0].measured", "at least 0: got -0.02"),
        ("{sku: nvidia-h200, sm_count: 132}", "{sku: x, sm_count: 0}", "modelled.scaled_from.sm_count", "at least 1"),
    ],
)
def test_a_broken_rule_of_a_modelled_policy_names_its_place(old: str, new: str, place: str, rule: str) -> None:
    assert MODELLED_GOOD.count(old) == 1
    message = refusal(MODELLED_GOOD.replace(old, new))
    assert re.match(rf"p\.yaml:\d+: {re.escape(place)} ", message)
    assert rule in message


def test_a_modelled_policy_must_state_what_it_was_scaled_from() -> None:
    with pytest.raises(PolicyError, match="exactly where evidence is modelled: got none with evidence modelled"):
        dump_policy(modelled_policy(modelled=None))


def test_a_measured_table_states_no_uncertainty() -> None:
    (uncertain,) = modelled_policy().tables
    with pytest.raises(PolicyError, match=r"tables\[0\]\.uncertainty must be absent from a measured table"):
        dump_policy(policy(table(uncertainty=uncertain.uncertainty)))


def test_the_line_is_that_of_the_value() -> None:
    message = refusal(changed("geomean: 1.2", "geomean: 0.5"))
    line = GOOD[: GOOD.index("geomean: 1.2,")].count("\n") + 1
    assert message.startswith(f"p.yaml:{line}: tables[0].held_out.slowdown[1].geomean ")


def test_an_unreadable_byte_is_reported_with_its_line(tmp_path: Path) -> None:
    assert refusal(GOOD.encode().replace(b"regime: graph", b"regime: \xc3")).startswith("p.yaml:7: must be UTF-8")
