"""Drawing forwards, carrying them in a file, and comparing predictions with what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.fit.observations import Observations
from mla_tune.fit.scope import scope
from mla_tune.replay.spot import FORMAT, VERSION, ForwardList, draw, read_forwards, write_forwards
from mla_tune.replay.spot_result import compare
from mla_tune.sites.shape import AnyShape, RaggedShape, Shape
from mla_tune.sites.site import FORWARD, SiteName
from mla_tune.store.measurement import Role
from tests.replay.conftest import export, pricer
from tests.shapes import one_by_one, ragged_shapes

occurrences = st.dictionaries(ragged_shapes(4, 30, 300), st.integers(1, 9), min_size=1, max_size=20)


def listed(occurred: dict[AnyShape, int], count: int = 5, seed: int = 0) -> ForwardList:
    return ForwardList(
        format=FORMAT,
        version=VERSION,
        model="deepseek-v4-flash",
        h_q=64,
        source="made up",
        seed=seed,
        forwards=draw(occurred, count, seed),
    )


@given(occurrences, st.integers(1, 30), st.integers(0, 99))
def test_a_draw_is_of_distinct_forwards_that_occurred_and_repeats_with_its_seed(
    occurred: dict[AnyShape, int], count: int, seed: int
) -> None:
    drawn = draw(occurred, count, seed)
    assert drawn == draw(occurred, count, seed)
    assert all(occurred[forward.shape] == forward.occurred for forward in drawn)
    keys = [forward.shape.evened() for forward in drawn]
    assert len(set(keys)) == len(keys)
    distinct = {Shape(s.num_reqs, s.num_qo_tokens, s.kv_tokens) for s in occurred}
    assert len(drawn) == min(count, len(distinct))


def test_frequent_forwards_are_drawn_more_often_and_another_seed_draws_others() -> None:
    occurred: dict[AnyShape, int] = {RaggedShape(((n, 100),)): 50 if n == 7 else 1 for n in range(1, 51)}
    draws = [draw(occurred, 1, seed)[0].shape for seed in range(200)]
    share = draws.count(RaggedShape(((7, 100),))) / len(draws)
    assert share == pytest.approx(50 / 99, abs=0.12)
    assert len(set(draws)) > 30


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(occurrences)
def test_a_list_comes_back_from_its_file(tmp_path: Path, occurred: dict[AnyShape, int]) -> None:
    path = tmp_path / "forwards.json"
    written = listed(occurred)
    write_forwards(path, written)
    assert read_forwards(path) == written


SOUND: dict[str, Any] = json.loads(msgspec.json.encode(listed({RaggedShape(((3, 10), (1, 9))): 2})))
ONE = SOUND["forwards"][0]
HOSTILE: dict[str, tuple[object, str]] = {
    "no object": ([], "Expected `object`"),
    "another format": (SOUND | {"format": "mla-tune-measurements"}, "format must be mla-tune-forwards 1"),
    "another version": (SOUND | {"version": 2}, "got mla-tune-forwards 2"),
    "unknown key": (SOUND | {"extra": 1}, "unknown field `extra`"),
    "unknown model": (SOUND | {"model": "v9"}, "model must be a known one"),
    "heads that are not padded": (SOUND | {"h_q": 16}, "got 16; accepted: 64"),
    "no forwards": (SOUND | {"forwards": []}, "got 0"),
    "too many forwards": (SOUND | {"forwards": [ONE] * 10_001}, "got 10001"),
    "the same twice": (SOUND | {"forwards": [ONE, ONE]}, "twice"),
    "no requests": (SOUND | {"forwards": [ONE | {"requests": []}]}, "1 to 65536 requests"),
    "no new tokens": (SOUND | {"forwards": [ONE | {"requests": [[0, 5]]}]}, "Expected `int` >= 1"),
    "more new tokens than context": (SOUND | {"forwards": [ONE | {"requests": [[6, 5]]}]}, "6 new tokens of 5"),
    "beyond the model": (SOUND | {"forwards": [ONE | {"requests": [[6, 1 << 30]]}]}, "must fit the 1048576 tokens"),
    "huge numbers": (SOUND | {"forwards": [ONE | {"requests": [[6, 10**40]]}]}, "not a list of forwards"),
}


@pytest.mark.parametrize(("content", "said"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_list_is_refused_in_one_line(content: object, said: str, tmp_path: Path) -> None:
    path = tmp_path / "forwards.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as caught:
        read_forwards(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}: not a list of forwards: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, -1, 10_001])
def test_a_number_of_forwards_that_nobody_measures_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"got {count}"):
        draw({RaggedShape(((1, 1),)): 1}, count, 0)


def test_files_that_cannot_be_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be readable"):
        read_forwards(tmp_path / "no.json")
    with pytest.raises(UsageError, match="must be writable"):
        write_forwards(tmp_path / "no" / "folder.json", listed({RaggedShape(((1, 1),)): 1}))
    with pytest.raises(UsageError, match="must be writable"):
        write_forwards("/dev/null", listed({RaggedShape(((1, 1),)): 1}))


def test_a_comparison_sets_predictions_beside_what_was_measured() -> None:
    prices, found = pricer(), export()
    observations = Observations(found.measurements)
    table = prices.tables.attention
    where = scope(SiteName.PREFILL_ATTENTION, prices.model, FORWARD, table.h_q)
    keys = where.swept(observations, Role.HELD_OUT)[:10]
    compared = compare(prices, observations, [one_by_one(key) for key in keys])
    assert (compared.forwards, compared.complete) == (10, 10)
    whole = {(line.shape.evened(), line.candidate): line for line in compared.lines if line.layer == FORWARD}
    assert len(whole) == 20
    for key in keys:
        for name in table.candidates:
            line = whole[key, name]
            assert line.measured_us == where.measured_us(observations, name, key)
            by_type = [
                x for x in compared.lines if (x.shape.evened(), x.candidate) == (key, name) and x.layer != FORWARD
            ]
            assert len(by_type) == 3
            assert sum(x.measured_us or math.nan for x in by_type) == pytest.approx(line.measured_us)
            assert sum(x.predicted_us for x in by_type) == pytest.approx(line.predicted_us)
    for entry in compared.accuracy:
        assert entry.p5 <= entry.median <= entry.p95
        assert 0.8 < entry.median < 1.2
    rules = {rule.rule: rule for rule in compared.rules}
    fastest = [min(whole[key, name].measured_us or math.nan for name in table.candidates) for key in keys]
    assert all(rule.measured_us >= sum(fastest) * (1 - 1e-12) and rule.worst >= 1 for rule in compared.rules)
    always = [rules[f"always {name}"] for name in table.candidates]
    assert sum(rule.slower_at for rule in always) <= 10


def test_a_forward_at_which_a_candidate_failed_is_told_and_judged_for_no_rule() -> None:
    prices, found = pricer(), export()
    observations = Observations(
        m for m in found.measurements if (m.candidate, m.site.layer) != ("with_kvcache", "c128a")
    )
    key = Shape(1, 64, 131072)
    compared = compare(prices, observations, [one_by_one(key)])
    assert (compared.forwards, compared.complete, compared.rules) == (1, 0, ())
    missing = {(line.layer, line.candidate) for line in compared.lines if line.measured_us is None}
    assert missing == {("c128a", "with_kvcache"), (FORWARD, "with_kvcache")}


def test_a_model_of_one_layer_type_has_no_second_line_for_its_forward() -> None:
    prices = pricer("deepseek-v3.2", 128)
    compared = compare(prices, Observations(export().measurements), [one_by_one(Shape(1, 64, 131072))])
    assert [line.layer for line in compared.lines] == ["dsa", "dsa"]
    assert replace(compared, lines=()).complete == 1
