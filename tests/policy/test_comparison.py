"""What two policies answer differently: nothing for equal ones, and every shape whose answer changes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import PolicyError, UsageError
from mla_tune.policy.codec import dump_policy, parse_policy
from mla_tune.policy.comparison import compare_policies, evidence_changes, grid_shapes, table_name
from mla_tune.policy.decision import Decision
from mla_tune.policy.schema import Choice, Gpu, Limit, Policy, Range, Row, Table
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.served_shapes import ServedShape, Traffic
from tests.policy.strategies import evidence, policies, policy, table

SMALL = Range(num_qo_tokens=(1, 4096), kv_tokens=(1024, 1 << 20), num_reqs=(1, 4))


def crossing(count: int, **changes: Any) -> Table:
    """A table that takes with_kvcache below ``count`` query tokens."""
    choices = (Choice(candidate="with_kvcache"), Choice(threshold=Threshold.level(count), candidate="sparse_fwd"))
    return table(measured=SMALL, rows=(Row(choices=choices),), **changes)


@settings(max_examples=30, deadline=None)
@given(policies())
def test_a_policy_written_and_read_again_differs_in_nothing(original: Policy) -> None:
    change = compare_policies(original, parse_policy(dump_policy(original), "again"))
    assert change.serves_alike
    assert (change.changed, change.tables, change.served, change.provenance) == (0, (), (), ())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 4096))
def test_every_shape_between_two_thresholds_is_counted_and_no_other(low: int, high: int) -> None:
    before, after = policy(crossing(low)), policy(crossing(high))
    change = compare_policies(before, after)
    expected = sum(min(low, high) <= tokens < max(low, high) for tokens, _, _ in grid_shapes([SMALL]))
    assert change.changed == expected
    if low != high:
        (of_table,) = change.tables
        assert of_table.shapes == len(list(grid_shapes([SMALL])))
        assert sum(move.shapes for move in of_table.moves) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 4096))
def test_the_way_back_changes_the_same_shapes(low: int, high: int) -> None:
    one, other = policy(crossing(low)), policy(crossing(high))
    there, back = compare_policies(one, other), compare_policies(other, one)
    assert there.changed == back.changed
    assert [(move.before, move.after) for of in there.tables for move in of.moves] == [
        (move.after, move.before) for of in back.tables for move in of.moves
    ]


def test_a_threshold_that_moves_between_the_shapes_of_the_grid_is_a_difference_without_a_changed_answer() -> None:
    change = compare_policies(policy(crossing(1100)), policy(crossing(1101)))
    assert not change.serves_alike
    assert (change.changed, [of.settings for of in change.tables]) == (0, [()])


def test_provenance_alone_is_no_difference_to_a_server() -> None:
    before = policy()
    source = msgspec.structs.replace(before.source, sha256="2" * 64, measurements=1300)
    environment = msgspec.structs.replace(before.environment, torch="2.14.1")
    change = compare_policies(before, msgspec.structs.replace(before, source=source, environment=environment))
    assert change.serves_alike
    assert change.provenance == (
        "torch: 2.11.0+cu130 -> 2.14.1",
        "measurements: 1234 -> 1300",
        "export's sha256: 111111111111 -> 222222222222",
    )


def test_limits_builds_ranges_and_library_files_are_named() -> None:
    before = policy(crossing(512, limits=(Limit(candidate="with_kvcache", num_qo_tokens=11622),)))
    wider = msgspec.structs.replace(SMALL, num_reqs=(1, 8))
    changed = crossing(512, builds=("sgl-flash-mla==1.1.0",))
    after = policy(msgspec.structs.replace(changed, measured=wider))
    library = msgspec.structs.replace(before.environment.libraries[0], sha256="f" * 64)
    after = msgspec.structs.replace(after, environment=msgspec.structs.replace(after.environment, libraries=(library,)))
    change = compare_policies(before, after)
    assert change.served == ("library sgl-flash-mla: 1.0.0 (000000000000) -> 1.0.0 (ffffffffffff)",)
    assert change.tables[0].settings == (
        "builds: sgl-flash-mla==1.0.0 -> sgl-flash-mla==1.1.0",
        "measured requests: 1 to 4 -> 1 to 8",
        "limit of with_kvcache: 11622 -> none",
    )
    # Eight requests were outside before, where the engine's own choice is kept.
    assert {(move.before, move.requests) for move in change.tables[0].moves} == {("sparse_fwd", (8, 8))}


def test_a_new_table_is_compared_with_the_engines_own_choice() -> None:
    other = crossing(64, layer="c128a")
    change = compare_policies(policy(crossing(64)), policy(crossing(64), other))
    (new,) = change.tables
    assert new.settings == ("the table is new",)
    assert {(move.before, move.after) for move in new.moves} == {("sparse_fwd", "with_kvcache")}
    gone = compare_policies(policy(crossing(64), other), policy(crossing(64)))
    assert gone.tables[0].settings == ("the table is gone: the engine's own choice serves",)
    assert gone.changed == new.changed
    assert table_name(new.table) == "prefill_attention of deepseek-v4-flash, 64 heads, c128a"


def test_recorded_traffic_weighs_the_shapes_by_their_forwards() -> None:
    site = "prefill_attention", "deepseek-v4-flash"
    traffic = Traffic(
        {ServedShape(*site, 100, 2048, 1): 5, ServedShape(*site, 3000, 4096, 2): 7, ServedShape("x", "y", 1, 1, 1): 100}
    )
    change = compare_policies(policy(crossing(64)), policy(crossing(512)), traffic)
    assert (change.forwards, change.changed, change.tables[0].shapes) == (12, 5, 2)
    assert change.tables[0].share == pytest.approx(5 / 12)


def test_traffic_of_another_model_and_another_gpus_policy_are_refused() -> None:
    foreign = Traffic({ServedShape("prefill_attention", "deepseek-v3.2", 1, 1024, 1): 1})
    with pytest.raises(UsageError, match=r"got prefill_attention of deepseek-v3\.2"):
        compare_policies(policy(), policy(), foreign)
    with pytest.raises(UsageError, match="of one GPU are compared: got nvidia-h200 and nvidia-h100"):
        compare_policies(policy(), policy(gpu=Gpu(sku="nvidia-h100", sm_count=132)))


def test_the_grid_holds_possible_shapes_and_both_ends_of_the_range() -> None:
    shapes = list(grid_shapes([SMALL, Range(num_qo_tokens=(2, 8192), kv_tokens=(2048, 2048), num_reqs=(1, 3))]))
    assert all(reqs <= tokens <= kv for tokens, kv, reqs in shapes)
    assert {tokens for tokens, _, _ in shapes} >= {1, 2, 4096, 8192}
    assert {kv for _, kv, _ in shapes} >= {1024, 1 << 20}
    assert {reqs for _, _, reqs in shapes} == {1, 2, 4}
    assert len(shapes) == len(set(shapes))


def test_better_evidence_is_told_with_its_figures() -> None:
    before = evidence()
    assert list(evidence_changes(before, before)) == []
    assert list(evidence_changes(None, before)) == ["evidence beside the policy: none -> there"]
    judged = before.tables[0].held_out
    after = msgspec.structs.replace(before, overall=judged)
    assert list(evidence_changes(before, after)) == [f"held-out shapes: 0 -> {judged.points}"]


@settings(max_examples=15, deadline=None)
@given(policies(), policies())
def test_any_two_policies_of_one_gpu_are_compared_shape_by_shape(before: Policy, other: Policy) -> None:
    after = msgspec.structs.replace(other, gpu=before.gpu)
    traffic = Traffic({ServedShape(t.site, t.model, 7, 9000, 2): 3 for t in (*before.tables, *after.tables)})
    with suppress(PolicyError):  # a table may have limits that leave nothing to run
        list(map(Decision, (*before.tables, *after.tables)))
        _check_comparison(before, after, traffic)


def _check_comparison(before: Policy, after: Policy, traffic: Traffic) -> None:
    change = compare_policies(before, after, traffic)
    for of in change.tables:
        answers = [
            Decision(version).choose(7, 9000, 2) if version is not None else of.table.incumbent
            for version in (of.before, of.after)
        ]
        assert of.changed == (3 if answers[0] != answers[1] else 0)
