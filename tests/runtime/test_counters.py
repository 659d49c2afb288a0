"""What is counted: lookups, their answers, those outside the measured ranges, and what was left to the engine and why."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.runtime import Dispatcher
from mla_tune.runtime.counters import Reasons, SiteCounters, prometheus_text
from mla_tune.runtime.decider import Service
from mla_tune.runtime.switches import Switches
from tests.policy.strategies import full_policy, policy, table

SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z0-9_]+="(?:[^"\\\n]|\\.)*",?)*)\} (\d+)')


def parsed(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], int]:
    """The samples of a Prometheus text, read by the rules of its format; fails on any other line."""
    found = {}
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        labels = frozenset(re.findall(r'([a-z0-9_]+)="((?:[^"\\]|\\.)*)"', match[2]))
        assert (match[1], labels) not in found, "no sample twice"
        found[match[1], labels] = int(match[3])
    return found


def total(text: str, name: str, **labels: str) -> int:
    """The sum of the samples of ``name`` with these labels."""
    wanted = set(labels.items())
    return sum(value for (metric, having), value in parsed(text).items() if metric == name and wanted <= having)


@given(st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 1 << 27), st.integers(1, 64)), max_size=30))
def test_every_lookup_is_counted_with_its_answer(forwards: list[tuple[int, int, int]]) -> None:
    service = Service(Dispatcher(policy(), source="p.yaml"))
    decider = service.decider("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    answers = Counter(decider(*forward) for forward in forwards)
    outside = sum(not (16 <= q <= 32768 and 2048 <= kv <= 1 << 26) for q, kv, _ in forwards)
    text = service.prometheus_text()
    labels = {"site": "prefill_attention", "model": "deepseek-v4-flash", "layer": "c4a"}
    assert total(text, "mla_tune_lookups_total", **labels) == len(forwards)
    assert total(text, "mla_tune_out_of_range_total", **labels) == outside
    for candidate in ("sparse_fwd", "with_kvcache"):
        assert total(text, "mla_tune_choices_total", candidate=candidate, **labels) == answers[candidate]


def test_a_decider_answers_what_the_policy_answers() -> None:
    service = Service(Dispatcher(policy(), source="p.yaml"))
    decider = service.decider("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    for q in (15, 16, 4095, 4096, 32768, 32769):
        expected = "with_kvcache" if 16 <= q < 4096 else "sparse_fwd"
        assert decider(q, 100_000, 3) == expected


@pytest.mark.parametrize(
    ("dispatcher", "setting", "reason"),
    [
        (Dispatcher(full_policy(), source="p"), "--flag", Reasons.ENGINE_SETTING),
        (Dispatcher(None, source="off", switches=Switches(off="MLA_TUNE_MODE=off")), None, Reasons.OFF),
        (Dispatcher(None, source="no file"), None, Reasons.NO_TABLE),
        (Dispatcher(policy(table(layer="c128a")), source="p"), None, Reasons.NO_TABLE),
    ],
)
def test_a_site_that_the_engine_keeps_says_why(dispatcher: Dispatcher, setting: str | None, reason: str) -> None:
    service = Service(dispatcher)
    decider = service.decider("prefill_attention", model="deepseek-v4-flash", layer="c4a", engine_setting=setting)
    assert not decider.serves
    assert decider.kept == reason
    decider.counters.fell_back(decider.kept)
    assert total(service.prometheus_text(), "mla_tune_fallbacks_total", reason=reason) == 1
    assert total(service.prometheus_text(), "mla_tune_lookups_total") == 0


def test_the_same_site_asked_for_again_counts_on() -> None:
    service = Service(Dispatcher(policy(), source="p.yaml"))
    one, other = (service.decider("prefill_attention", model="deepseek-v4-flash", layer="c4a") for _ in range(2))
    assert one is other


def test_the_policy_is_a_sample_of_its_own() -> None:
    text = Service(Dispatcher(policy(), source="p.yaml", digest="ab12")).prometheus_text()
    assert total(text, "mla_tune_policy_info", digest="ab12", sku="nvidia-h200", evidence="measured", mode="auto") == 1


@given(st.text(), st.integers(0, 1 << 62))
def test_any_label_is_escaped(name: str, count: int) -> None:
    text = prometheus_text([SiteCounters(name, "m", "l", {"a": count}, {name: 1})], {"source": name})
    escaped = name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    labels = 'site="' + escaped + '",model="m",layer="l"'
    assert f'mla_tune_choices_total{{{labels},candidate="a"}} {count}\n' in text
    assert f'mla_tune_policy_info{{source="{escaped}"}} 1\n' in text
