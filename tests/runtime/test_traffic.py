"""Recorded shapes: what is written is read back, bins are as fine as they say, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.errors import StoreError
from mla_tune.sites.served_shapes import (
    EXACT_BELOW,
    HALF,
    ServedShape,
    Traffic,
    bin_middle,
    bin_start,
    bounded,
    dump_traffic,
    parse_traffic,
    read_traffic,
    write_traffic,
)

counts = st.integers(0, 1 << 40)
names = st.sampled_from(["prefill_attention", "indexer_metadata"])
shapes = st.builds(ServedShape, names, st.text(max_size=5), counts, counts, counts)
traffics = st.builds(Traffic, st.dictionaries(shapes, st.integers(1, 1 << 40), max_size=20), st.integers(0, 1 << 40))


@given(traffics)
def test_a_recording_is_read_back_as_it_was_written(traffic: Traffic) -> None:
    data = dump_traffic(traffic)
    assert parse_traffic(data.splitlines(keepends=True), "test") == traffic
    assert dump_traffic(parse_traffic(data.splitlines(), "test")) == data


@given(traffics, traffics)
def test_two_recordings_add_up_in_either_order(one: Traffic, other: Traffic) -> None:
    both = one.plus(other)
    assert both == other.plus(one)
    assert sum(both.forwards.values()) + both.dropped == sum(
        sum(traffic.forwards.values()) + traffic.dropped for traffic in (one, other)
    )


@given(st.integers(0, 1 << 62))
def test_a_bin_is_exact_where_counts_are_small_and_narrow_elsewhere(count: int) -> None:
    start, middle = bin_start(count), bin_middle(bin_start(count))
    assert start <= count
    assert bin_start(middle) == start
    assert bin_start(start) == start
    assert abs(middle - count) * HALF <= count
    if count < EXACT_BELOW:
        assert middle == count


@given(st.lists(st.integers(0, 1 << 40), min_size=2, max_size=2))
def test_bins_keep_the_order(pair: list[int]) -> None:
    low, high = sorted(pair)
    assert bin_start(low) <= bin_start(high)


def test_the_rarest_cells_beyond_the_bound_are_counted_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_tune.sites.served_shapes.MAX_CELLS", 2)
    cells = {ServedShape("s", "m", size, 1, 1): size for size in (5, 1, 3)}
    kept = bounded(cells, dropped=10)
    assert sorted(kept.forwards.values()) == [3, 5]
    assert kept.dropped == 11


HEADER = '{"format":"mla-tune-traffic","version":1,"forwards_dropped":0}\n'
CELL = '{"site":"s","model":"m","num_qo_tokens":1,"kv_tokens":2,"num_reqs":1,"forwards":3}\n'


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ":1: must be one line of a traffic file"),
        ("schema: 1\n", ":1: must be one line of a traffic file"),
        (CELL, ":1: must be one line of a traffic file"),
        (HEADER.replace("1,", "2,"), ":1: must say mla-tune-traffic version 1"),
        (HEADER.replace("traffic", "trace"), ":1: must say mla-tune-traffic version 1"),
        (HEADER + CELL[:-10], ":2: must be one line of a traffic file"),
        (HEADER + CELL + CELL, ":3: must be a new shape"),
        (HEADER + CELL.replace("3}", "0}"), ":2: must be a new shape with at least one forward"),
        (
            HEADER + CELL.replace(":2,", ":-2,"),
            ":2: must be a new shape with at least one forward and no negative count",
        ),
        (HEADER + CELL.replace('"num_reqs":1,', ""), ":2: must be one line of a traffic file"),
        (HEADER + CELL.replace("3}", '3,"more":1}'), ":2: must be one line of a traffic file"),
    ],
)
def test_what_is_no_recording_is_refused_at_its_line(text: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text(text)
    with pytest.raises(StoreError) as caught:
        read_traffic(path)
    assert str(caught.value).startswith(f"{path}{place}")
    assert "\n" not in str(caught.value)


def test_a_missing_recording_is_refused_with_the_variable_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"No such file.*MLA_TUNE_RECORD"):
        read_traffic(tmp_path / "none.jsonl")


def test_a_file_on_disk_is_read_back(tmp_path: Path) -> None:
    traffic = Traffic({ServedShape("prefill_attention", "deepseek-v4-flash", 8192, 131072, 4): 17}, dropped=2)
    write_traffic(tmp_path / "t.jsonl", traffic)
    assert read_traffic(tmp_path / "t.jsonl") == traffic
