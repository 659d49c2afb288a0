"""Laws of a comparison: its accounts add up exactly, and it depends on what ran and on nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import TraceError
from mla_tune.trace import wording
from mla_tune.trace.difference import Group, TraceDiff, compare_traces
from mla_tune.trace.side import trace_files
from mla_tune.trace.summary import Lane
from tests.trace.traces import Row, document, kernel, some_events, write

FEW = settings(max_examples=40)  # each writes and reads two files or four


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def compared(folder: Path, a: list[Row], b: list[Row]) -> TraceDiff:
    files = [write(folder / f"{name}.json", document(rows)) for name, rows in (("a", a), ("b", b))]
    return compare_traces(files[:1], files[1:])


def deltas(found: TraceDiff) -> dict[str, int]:
    by_name = {f"{change.work.kind} {change.work.name}": change.delta_ns for change in found.changes}
    return by_name | {total.name: total.delta for total in found.totals()}


@FEW
@given(some_events(), some_events())
def test_every_account_adds_up_to_its_total_in_every_column(folder: Path, a: list[Row], b: list[Row]) -> None:
    found = compared(folder, a, b)
    for side in ("a", "b", "delta"):
        assert sum(getattr(line, side) for line in found.times()) == getattr(found.wall, side)
        assert sum(getattr(half, side) for half in found.halves()) == getattr(found.wall, side)
        runs = [total for total in found.totals() if total.name.startswith("GPU ") and not total.is_time]
        assert sum(getattr(line, side) for line in found.counts()) == sum(getattr(total, side) for total in runs)
        assert sum(getattr(line, side) for line in found.events()) == getattr(found.totals()[0], side)
    assert (found.a.events, found.b.events) == (len(a), len(b))
    for of_side in (found.a, found.b):
        assert of_side.wall_without_nccl_ns <= of_side.wall_ns <= of_side.sum_ns


@given(some_events())
def test_a_trace_differs_from_itself_in_nothing(folder: Path, rows: list[Row]) -> None:
    found = compared(folder, rows, rows)
    assert {change.group for change in found.changes} == {Group.STEADY}
    assert set(deltas(found).values()) == {0}
    assert wording.verdict(found) == "no difference: the same work ran as often and as long"


@FEW
@given(some_events(), some_events(), st.integers())
def test_the_order_of_events_does_not_matter(folder: Path, a: list[Row], b: list[Row], seed: int) -> None:
    found = compared(folder, a, b)
    shuffled = a[:], b[:]
    for rows in shuffled:
        random.Random(seed).shuffle(rows)
    again = compared(folder, *shuffled)
    assert again.changes == found.changes
    assert (again.totals(), again.times(), again.counts()) == (found.totals(), found.times(), found.counts())


@FEW
@given(some_events(), some_events())
def test_swapping_the_sides_negates_every_delta(folder: Path, a: list[Row], b: list[Row]) -> None:
    found, swapped = compared(folder, a, b), compared(folder, b, a)
    assert deltas(swapped) == {name: -delta for name, delta in deltas(found).items()}
    for group, other in (
        (Group.ADDED, Group.REMOVED),
        (Group.REMOVED, Group.ADDED),
        (Group.RECOUNTED, Group.RECOUNTED),
    ):
        assert {change.work for change in swapped.of(group)} == {change.work for change in found.of(other)}


@pytest.mark.parametrize(
    ("before_us", "after_us", "group"),
    [
        ("50.000", "60.000", Group.RETIMED),
        ("50.000", "59.999", Group.STEADY),  # 20 % but less than 10 us
        ("50.000", "40.000", Group.RETIMED),
        ("50.001", "60.001", Group.STEADY),  # 10 us but less than 20 %
        ("1000.000", "1199.999", Group.STEADY),
        ("1000.000", "1200.000", Group.RETIMED),
        ("0", "10", Group.RETIMED),
    ],
)
def test_a_time_has_changed_from_10_us_and_20_percent_on(
    before_us: str, after_us: str, group: Group, tmp_path: Path
) -> None:
    found = compared(tmp_path, [kernel("gemm", "1", before_us)], [kernel("gemm", "1", after_us)])
    assert [change.group for change in found.changes] == [group]


def test_streams_that_overlap_count_once_in_the_wall_and_twice_in_the_sum(tmp_path: Path) -> None:
    rows = [kernel("gemm", 100, 50), kernel("softmax", 120, 50, stream=8), kernel("gemm", 100, 30, device=1)]
    found = compared(tmp_path, rows, rows)
    assert (found.a.wall_ns, found.a.sum_ns) == (100_000, 130_000)


def test_the_wall_without_nccl_keeps_what_ran_beside_it(tmp_path: Path) -> None:
    rows = [kernel("ncclDevKernel_AllGather_RING_LL", 100, 100), kernel("gemm", 150, 100, stream=8)]
    found = compared(tmp_path, rows, rows)
    assert (found.a.wall_ns, found.a.wall_without_nccl_ns, found.nccl_alone().a) == (150_000, 100_000, 50_000)


def test_an_annotation_on_the_gpu_is_no_work(tmp_path: Path) -> None:
    rows = [kernel("gemm", 100, 10), kernel("step", 0, 1000, cat="gpu_user_annotation")]
    assert compared(tmp_path, rows, rows).wall.a == 10_000


def test_traces_without_a_gpu_compare_operators_of_the_cpu(tmp_path: Path) -> None:
    rows = [kernel("aten::matmul", 0, 100, cat="cpu_op"), kernel("aten::mm", 10, 80, cat="cpu_op")]
    found = compared(tmp_path, rows, rows[:1])
    assert found.lane is Lane.CPU
    assert [(total.name, total.a, total.b) for total in found.totals()[1:4:2]] == [
        ("CPU operators", 2, 1),
        ("CPU wall", 100_000, 100_000),
    ]
    assert "operators of the CPU" in wording.notes(found)[0]


def test_a_side_without_gpu_work_beside_one_with_it_is_said(tmp_path: Path) -> None:
    found = compared(tmp_path, [kernel("gemm", 0, 1)], [kernel("aten::mm", 0, 1, cat="cpu_op")])
    assert found.lane is Lane.GPU
    assert wording.notes(found)[0].startswith("B has no GPU work")


def run_of(folder: Path, **ranks: int) -> Path:
    folder.mkdir()
    for name, rank in ranks.items():
        write(folder / f"{name}.json.gz", document([kernel("gemm", 1, 10 + rank)], rank))
    return folder


def test_ranks_are_matched_by_what_the_files_say_and_not_by_their_names(tmp_path: Path) -> None:
    a, b = run_of(tmp_path / "a", one=0, two=3), run_of(tmp_path / "b", x=3, y=0)
    found = compare_traces(trace_files(str(a)), trace_files(f"{b / 'x.json.gz'},{b / 'y.json.gz'}"))
    assert [(total.name, total.a, total.delta) for total in found.ranks()] == [
        ("rank 0", 10_000, 0),
        ("rank 3", 13_000, 0),
    ]
    assert found.wall.a == 23_000
    assert trace_files(str(tmp_path / "a" / "*.gz")) == trace_files(str(a))


def test_sides_of_different_ranks_are_refused_but_single_traces_are_compared(tmp_path: Path) -> None:
    a, b = run_of(tmp_path / "a", one=0, two=1), run_of(tmp_path / "b", one=0, two=2)
    with pytest.raises(TraceError, match="the same ranks: A has 0, 1, B has 0, 2"):
        compare_traces(trace_files(str(a)), trace_files(str(b)))
    one, other = a / "two.json.gz", b / "two.json.gz"
    assert "A is of rank 1, B of rank 2" in wording.notes(compare_traces([one], [other]))


def test_two_traces_of_one_rank_or_of_none_make_no_run(tmp_path: Path) -> None:
    twice = run_of(tmp_path / "a", one=1, two=1)
    with pytest.raises(TraceError, match="both of rank 1"):
        compare_traces(trace_files(str(twice)), trace_files(str(twice)))
    write(twice / "one.json.gz", document([kernel("gemm", 1, 1)]))
    with pytest.raises(TraceError, match=r"one\.json\.gz has no distributedInfo"):
        compare_traces(trace_files(str(twice)), trace_files(str(twice)))


@settings(max_examples=10)
@given(st.lists(some_events(), min_size=2, max_size=3))
def test_figures_of_a_run_are_sums_over_its_ranks(folder: Path, runs: list[list[Row]]) -> None:
    files = [write(folder / f"{rank}.json", document(rows, rank)) for rank, rows in enumerate(runs)]
    together = compare_traces(files, files)
    alone = [compare_traces([file], [file]) for file in files]
    for total, *parts in zip(together.totals(), *(found.totals() for found in alone), strict=True):
        assert total.a == sum(part.a for part in parts)
