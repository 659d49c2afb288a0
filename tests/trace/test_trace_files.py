"""Every form that a trace's file may have, whole, cut short or no trace at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.errors import TraceError
from mla_tune.trace import event_stream
from mla_tune.trace.chrome_event import EventKind, nanoseconds
from mla_tune.trace.event_stream import EventStream
from mla_tune.trace.summary import TraceSummary, summarize_trace
from tests.trace.traces import Row, document, kernel, some_events, write

KERNELS = [kernel("gemm", 10, 4), kernel("softmax, } , {", 13, 2, stream=8), kernel("gemm", 20, 1.5)]


def figures(found: TraceSummary) -> tuple[int, int, int]:
    """Events, kernels, and the wall in nanoseconds."""
    runs = sum(tally.count for work, tally in found.work.items() if work.kind is EventKind.KERNEL)
    return sum(found.events.values()), runs, found.wall_ns


WHOLE = (3, 3, 6_500)


@given(some_events(), st.integers(1, 400))
def test_a_file_reads_the_same_in_pieces_of_any_length(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], piece: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "pieces.json", document(rows, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_stream, "PIECE_BYTES", piece)
        stream = EventStream(path)
        read = [event for events in stream.pieces() for event in events]
        in_pieces = summarize_trace(path)
    assert [(event.name, event.cat) for event in read] == [(row["name"], row["cat"]) for row in rows]
    assert stream.rank == 5
    assert in_pieces == summarize_trace(path)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_no_more_is_held_than_two_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / name, document([kernel("gemm", n, 1) for n in range(2000)]))
    monkeypatch.setattr(event_stream, "PIECE_BYTES", 20_000)
    counts = [len(events) for events in EventStream(path).pieces()]
    assert sum(counts) == 2000
    assert max(counts) < 300  # of some 150 bytes each


def perfetto() -> dict[str, object]:
    """The same three kernels as an export of Perfetto may have them: times as strings, a pair of begin and end."""
    thread = {"pid": 1004, "tid": 2}
    first = {"ph": "B", "cat": "kernel", "name": "gemm", "ts": "10.000", "args": {"device": 0, "stream": 7}}
    rows: list[Row] = [
        {"ph": "M", "name": "process_name", "pid": 1004, "args": {"name": "python 1004"}},
        {"ph": "M", "name": "thread_name", **thread, "args": {"name": "stream 7"}},
        {**first, **thread},
        {"ph": "E", "ts": "14.000", **thread},
        {**KERNELS[1], "pid": 1004, "tid": 3, "ts": "13.000", "dur": "2.000"},
        {**KERNELS[2], **thread, "ts": "20", "dur": "1.5"},
        {"ph": "i", "s": "g", "name": "Record Window End", "ts": "99"},
    ]
    return {"traceEvents": rows, "displayTimeUnit": "ns", "metadata": {"trace-config": [{"a": {}}, {"b": {}}]}}


FORMS = {
    "compressed": ("a.json.gz", document(KERNELS), WHOLE),
    "plain": ("a.json", document(KERNELS), WHOLE),
    "compressed under another name": ("a.trace", document(KERNELS), WHOLE),
    "a bare list": ("a.json", KERNELS, WHOLE),
    "events before everything else": ("a.json", {"traceEvents": KERNELS, **document([])} | {"traceEvents": KERNELS}, WHOLE),
    "events named deeper down first": ("a.json", {"x": {"traceEvents": []}, "y": "a", **document(KERNELS)}, WHOLE),
    "events named in a string first": ("a.json", {"x": '"traceEvents": [', **document(KERNELS)}, WHOLE),
    "no process group": ("a.json", document(KERNELS) | {"distributedInfo": None}, WHOLE),
    "exported by Perfetto": ("a.json", perfetto(), (7, 3, 6_500)),
    "categories of torch 1.12": ("a.json", document([row | {"cat": "Kernel"} for row in KERNELS]), WHOLE),
    "a device that only its process names": ("a.json", document([row | {"args": {}} for row in KERNELS]), WHOLE),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_of_a_trace_is_read(
    name: str, content: object, expected: tuple[int, int, int], tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    if name.endswith(".trace"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert figures(summarize_trace(path)) == expected


def test_a_number_that_json_does_not_have_costs_that_number_only(tmp_path: Path) -> None:
    text = json.dumps(document([row | {"args": {"bandwidth": "@"}} for row in KERNELS], 2))
    for number in ("inf", "-nan", "Infinity", "NaN"):
        path = tmp_path / "a.json"
        path.write_text(text.replace('"@"', number))
        assert figures(summarize_trace(path)) == WHOLE


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", document(KERNELS))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert figures(summarize_trace(path)) == WHOLE


def test_begins_and_ends_are_matched_in_each_thread_whatever_their_order(tmp_path: Path) -> None:
    def edge(phase: str, ts: int, tid: int, name: str = "", category: str = "kernel") -> Row:
        return {"ph": phase, "cat": category, "name": name, "pid": 0, "tid": tid, "ts": ts}

    rows = [
        edge("B", 0, 7, "graph", "user_annotation"),
        edge("B", 10, 7, "gemm"),
        edge("E", 14, 7),
        edge("E", 40, 7),
        edge("B", 20, 8, "softmax"),
        edge("E", 23, 8),
        edge("E", 90, 8),  # of a begin before the recording
        edge("B", 50, 7, "copy"),  # still running at the end of the recording
    ]
    found = [summarize_trace(write(tmp_path / "a.json", order)) for order in (rows, rows[::-1])]
    assert [figures(entry) for entry in found] == [(8, 3, 7_000)] * 2
    assert [entry.unfinished for entry in found] == [1, 1]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("1661203462598738.123", 1_661_203_462_598_738_123),  # a float would say 738.125
        ('"1661203462598738.123"', 1_661_203_462_598_738_123),
        ("12", 12_000),
        ("0.0005", 0),
        ("1.5e3", 1_500_000),
        ("-3.25", -3_250),
        ("null", None),
        ("", None),
    ],
)
def test_a_time_is_exact_to_the_nanosecond(written: str, expected: int | None) -> None:
    assert nanoseconds(msgspec.Raw(written.encode())) == expected


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as raised:
        summarize_trace(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("content", [document(KERNELS, 1), KERNELS], ids=["object", "list"])
def test_a_file_that_is_cut_anywhere_is_refused_in_one_line(name: str, content: object, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refusal(path)


FOREIGN = {
    "an empty file": (b"", "the file is empty"),
    "text": (b"hello", "begins with neither { nor ["),
    "a number": (b"12", "begins with neither"),
    "an object without events": (b'{"measurements": [1, 2]}', "it has no list traceEvents"),
    "events that are no list": (b'{"traceEvents": {"ph": "X"}}', "it has no list traceEvents"),
    "events deeper down": (b'{"a": {"traceEvents": []}}', "it has no list traceEvents"),
    "no event": (b'{"traceEvents": []}', "none of its 0 is a kernel"),
    "an empty list": (b"[]", "none of its 0 is a kernel"),
    "a list of numbers": (b"[1, 2]", "Expected `object`, got `int`"),
    "another program's events": (b'[{"ph": "X", "cat": "toplevel", "name": "x", "ts": 1, "dur": 2}]', "none of its 1 is a"),
    "an event with a list as name": (b'{"traceEvents": [{"ph": "X", "name": []}]}', "Expected `str | null`, got `array`"),
    "two documents": (b'{"traceEvents": []} {"traceEvents": []}', "the JSON cannot be read"),
    "a time in words": (b'[{"ph": "X", "cat": "kernel", "ts": "soon", "dur": 1}]', 'microseconds: got "soon"'),
    "a time that is not a number": (b'[{"ph": "X", "cat": "kernel", "ts": "nan", "dur": 1}]', 'got "nan"'),
    "a time beyond 64 bits": (b'[{"ph": "X", "cat": "kernel", "ts": 1e300, "dur": 1}]', "below 2^62 ns: got 1e300"),
    "an end before the begin": (b'[{"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": -1}]', "got -1000 ns of 'k'"),
    "a begin without a time": (b'[{"ph": "B", "cat": "kernel", "name": "k"}]', "'k' has none"),
    "arguments that are no object": (b'[{"ph": "X", "cat": "kernel", "ts": 1, "dur": 1, "args": [1]}]', "got `array`"),
    "bytes that are no text": (b'[{"ph": "X", "cat": "kernel", "name": "\xff"}]', "the JSON cannot be read"),
    "brackets without end": (b"[" * 100_000, "JSON"),
    "a damaged archive": (gzip.compress(b"[]" * 99)[:-8] + b"12345678", "the compressed data is damaged"),
    "an archive of something else": (gzip.compress(b"hello"), "begins with neither"),
    "a rank in words": (b'{"distributedInfo": {"rank": "zero"}, "traceEvents": []}', "distributedInfo is not what torch"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "said"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_trace_is_refused_in_one_line(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    assert said in refusal(path)


def test_a_kernel_without_a_duration_is_counted_and_said(tmp_path: Path) -> None:
    rows = [kernel("gemm", 1, None), {key: value for key, value in kernel("gemm", 1, 2).items() if key != "dur"}]
    found = summarize_trace(write(tmp_path / "a.json", rows))
    assert (figures(found), found.unfinished) == ((2, 2, 0), 2)
