"""Reading a trace: what is written comes back, and whatever is not a request is refused with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.replay.requests import Request
from mla_tune.replay.trace import read_trace

EXCERPT = Path(__file__).with_name("conversation.jsonl")
"""Made up in the published format: 24 requests of six conversations."""
SOUND = {"timestamp": 0, "input_length": 700, "output_length": 9, "hash_ids": [0, 1]}


def line(**change: object) -> bytes:
    return json.dumps(SOUND | change).encode() + b"\n"


@st.composite
def requests(draw: st.DrawFn) -> Request:
    prompt_tokens = draw(st.integers(1, 5000))
    count = -(-prompt_tokens // 512)
    blocks = tuple(draw(st.lists(st.integers(0, 2**63 - 1), min_size=count, max_size=count)))
    arrival_us = draw(st.integers(0, 10**9)) * 1e3
    return Request(arrival_us, prompt_tokens, draw(st.integers(0, 5000)), blocks, 512)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(requests(), min_size=1, max_size=8), st.booleans())
def test_what_is_written_comes_back_in_order_of_arrival(tmp_path: Path, written: list[Request], packed: bool) -> None:
    text = b"".join(
        line(
            timestamp=request.arrival_us / 1e3,
            input_length=request.prompt_tokens,
            output_length=request.output_tokens,
            hash_ids=list(request.blocks),
        )
        for request in written
    )
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(text) if packed else text)
    assert read_trace(path).requests == tuple(sorted(written, key=lambda request: request.arrival_us))


def test_a_trace_runs_at_its_speed() -> None:
    recorded, twice, at_once = (read_trace(EXCERPT, speed).requests for speed in (1.0, 2.0, float("inf")))
    assert recorded[-1].arrival_us > 0
    assert [r.arrival_us for r in twice] == [r.arrival_us / 2 for r in recorded]
    assert {r.arrival_us for r in at_once} == {0.0}


def test_prompts_longer_than_a_models_context_are_left_out_and_counted() -> None:
    trace = read_trace(EXCERPT)
    longest = max(request.prompt_tokens for request in trace.requests)
    kept = trace.within(longest - 1)
    assert 0 < kept.left_out < len(trace.requests)
    assert len(kept.requests) + kept.left_out == len(trace.requests)
    assert trace.within(longest) == trace
    with pytest.raises(UsageError, match=f"got {len(trace.requests)} prompts, all longer"):
        trace.within(1)


def test_the_last_block_of_a_prompt_is_shared_only_where_it_is_full() -> None:
    assert Request(0, 1024, 1, (7, 8), 512).full_blocks == (7, 8)
    assert Request(0, 1023, 1, (7, 8), 512).full_blocks == (7,)
    assert Request(0, 5, 1, (7,), 512).full_blocks == ()


HOSTILE = {
    "no json": (b"{\n", "line 1: not a request"),
    "a list": (b"[1]\n", "line 1: not a request"),
    "no object": (b"null\n", "line 1: not a request"),
    "cut": (line() + line()[:30], "line 2: not a request"),
    "noise": (bytes(range(128, 256)), "line 1: not a request"),
    "deep": (b"[" * 100_000, "line 1: not a request"),
    "unknown key": (line(session=4), "unknown field `session`"),
    "missing key": (b'{"timestamp": 0, "input_length": 5, "output_length": 5}\n', "missing required field `hash_ids`"),
    "negative time": (line(timestamp=-1), "$.timestamp"),
    "endless time": (line(timestamp=10**400), "line 1: not a request"),
    "time in words": (line(timestamp="now"), "$.timestamp"),
    "no time": (line().replace(b": 0,", b": NaN,"), "line 1: not a request"),
    "empty prompt": (line(input_length=0), "$.input_length"),
    "negative prompt": (line(input_length=-7), "$.input_length"),
    "huge prompt": (line(input_length=1 << 25), "$.input_length"),
    "prompt beyond 64 bits": (line(input_length=10**30), "$.input_length"),
    "half a token": (line(input_length=0.5), "$.input_length"),
    "negative answer": (line(output_length=-1), "$.output_length"),
    "negative id": (line(hash_ids=[0, -1]), "$.hash_ids"),
    "too few ids": (line(hash_ids=[0]), "got 1 for 700 tokens; accepted: 2"),
    "too many ids": (line(hash_ids=[0, 1, 2]), "got 3 for 700 tokens; accepted: 2"),
    "empty": (b"", "a trace must have a request"),
    "blank": (b"\n \n\n", "a trace must have a request"),
    "a second line that is wrong": (line() + b"\n" + line(output_length="few"), "line 3: not a request"),
    "cut gzip": (gzip.compress(line() * 99)[:40], "a compressed trace must be whole"),
    "damaged gzip": (gzip.compress(line() * 99)[:-8] + b"\0" * 8, "a compressed trace must be whole"),
    "nothing but a gzip head": (b"\x1f\x8b", "a compressed trace must be whole"),
}


@pytest.mark.parametrize(("data", "said"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_trace_is_refused_in_one_line_that_names_the_place(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert said in text
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 600


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_bytes_end_in_a_traceback(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "\0"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="a trace must be readable"):
        read_trace(name)


def test_a_trace_that_never_ends_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 268435456 bytes"):
        read_trace("/dev/zero")


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_a_speed_that_is_none_is_refused(speed: float) -> None:
    with pytest.raises(UsageError, match="speed must be above 0"):
        read_trace(EXCERPT, speed)
