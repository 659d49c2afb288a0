"""A pair that torch 2.13 recorded on a CPU, by ``mla-tune trace``, without host name and paths: counted in another way."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mla_tune.trace.chrome_event import EventKind
from mla_tune.trace.difference import Group, compare_traces
from mla_tune.trace.summary import Lane, summarize_trace

FOLDER = Path(__file__).parent / "recorded_pair"
PAIR = FOLDER / "sparse_fwd.json.gz", FOLDER / "with_kvcache.json.gz"


def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress(path.read_bytes()), parse_float=Decimal)["traceEvents"]
    return found


def span_ns(row: dict[str, Any]) -> tuple[int, int]:
    begin = int(row["ts"] * 1000)
    return begin, begin + int(row["dur"] * 1000)


@pytest.mark.parametrize("path", PAIR, ids=lambda path: path.name)
def test_counts_sums_and_wall_are_those_of_an_independent_count(path: Path) -> None:
    found = summarize_trace(path, Lane.CPU)
    operators = [row for row in rows(path) if row.get("cat") == "cpu_op"]
    spans = sorted(map(span_ns, operators))
    counts = Counter(row["name"] for row in operators)
    assert {work.name: tally.count for work, tally in found.work.items()} == dict(counts)
    assert sum(tally.sum_ns for tally in found.work.values()) == sum(end - begin for begin, end in spans)
    edges = sorted({edge for span in spans for edge in span})
    covered = sum(
        right - left for left, right in pairwise(edges) if any(begin <= left and right <= end for begin, end in spans)
    )
    assert found.wall_ns == covered
    assert sum(found.events.values()) == len(rows(path))


def test_the_pair_shows_what_only_one_path_does() -> None:
    found = compare_traces([PAIR[0]], [PAIR[1]])
    assert found.lane is Lane.CPU
    assert "aten::repeat_interleave" in {change.work.name for change in found.of(Group.REMOVED)}
    assert "aten::cat" in {change.work.name for change in found.of(Group.ADDED)}
    assert (found.a.kinds[EventKind.ANNOTATION], found.b.kinds[EventKind.ANNOTATION]) == (10, 6)
    assert sum(line.delta for line in found.times()) == found.wall.delta == -1_324_526
