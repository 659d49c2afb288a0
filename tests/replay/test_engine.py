"""The replayed server: nothing is lost, nothing is computed twice, and no bound is passed."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.replay.agents import AgentMix, Agents
from mla_tune.replay.requests import Request, RequestSource
from mla_tune.replay.scheduler import Replay, Server, replay
from mla_tune.replay.trace import Trace
from mla_tune.sites.shape import RaggedShape
from tests.replay.conftest import engines, small_traces

mixes = st.builds(
    AgentMix,
    agents=st.integers(1, 5),
    turns=st.integers(1, 6),
    first_prompt=st.integers(1, 60),
    turn_tokens=st.integers(1, 9),
    growth=st.integers(10, 20),
    pause_us=st.sampled_from([0.0, 50.0]),
    max_context=st.just(100),
    seed=st.integers(0, 9),
)
sources = small_traces() | mixes.map(Agents)


def clock(forward: RaggedShape) -> float:
    """Microseconds that anybody can compute: a constant and a share for each token."""
    return 2.0 + 0.25 * forward.num_qo_tokens + 0.001 * forward.kv_tokens


def run(source: RequestSource, engine: Server) -> Replay:
    return replay(source, engine, clock)


@given(sources, engines)
def test_every_prompt_token_is_computed_once_or_taken_from_the_cache(source: RequestSource, engine: Server) -> None:
    done = run(source, engine)
    computed: dict[int, list[range]] = {index: [] for index in range(len(done.served))}
    for step in done.steps:
        for part in step.parts:
            computed[part.request].append(range(part.start, part.start + part.tokens))
    for index, served in enumerate(done.served):
        positions = [position for piece in computed[index] for position in piece]
        assert positions == list(range(served.cached_tokens, served.request.prompt_tokens))
        assert 0 <= served.cached_tokens < served.request.prompt_tokens
    total = sum(part.tokens for step in done.steps for part in step.parts)
    assert total + done.cached_tokens == done.prompt_tokens


@given(sources, engines)
def test_every_request_is_served_in_order_and_forwards_never_overlap(source: RequestSource, engine: Server) -> None:
    done = run(source, engine)
    assert len(done.served) >= len(source.arrivals())
    for served in done.served:
        assert served.request.arrival_us <= served.admitted_us < served.prefilled_us <= served.finished_us
    assert [s.admitted_us for s in done.served] == sorted(s.admitted_us for s in done.served)
    for before, after in pairwise(done.steps):
        assert before.start_us < before.end_us <= after.start_us


@given(sources, engines)
def test_no_forward_and_no_moment_holds_more_than_the_server_takes(source: RequestSource, engine: Server) -> None:
    done = run(source, engine)
    for step in done.steps:
        assert 1 <= sum(part.tokens for part in step.parts) <= engine.chunk_tokens
        assert len({part.request for part in step.parts}) == len(step.parts)
    for moment in {served.admitted_us for served in done.served}:
        inside = sum(served.admitted_us <= moment < served.finished_us for served in done.served)
        assert inside <= engine.concurrency


@given(sources, engines)
def test_a_forward_is_full_unless_no_other_request_may_join_it(source: RequestSource, engine: Server) -> None:
    done = run(source, engine)
    for step in done.steps:
        if sum(part.tokens for part in step.parts) == engine.chunk_tokens:
            continue
        waiting = [s for s in done.served if s.request.arrival_us <= step.start_us < s.admitted_us]
        inside = [s for s in done.served if s.admitted_us <= step.start_us < s.finished_us]
        assert not waiting or len(inside) == engine.concurrency


@given(sources, engines)
def test_answers_take_their_decode_steps_and_a_place(source: RequestSource, engine: Server) -> None:
    for served in run(source, engine).served:
        steps = max(0, served.request.output_tokens - 1) if engine.decode_us else 0
        took_us = served.finished_us - served.prefilled_us
        assert took_us >= steps * engine.decode_us * (1 - 1e-9)
        assert steps or took_us == 0


@given(small_traces(), engines)
def test_a_prefix_is_found_exactly_where_an_earlier_forward_has_computed_its_blocks(
    trace: Trace, engine: Server
) -> None:
    done = run(trace, engine)
    for served in done.served:
        there: set[int] = set()
        for other_index, other in enumerate(done.served):
            size = other.request.block_tokens
            for step in done.steps:
                if step.end_us <= served.admitted_us:
                    ends = [part.start + part.tokens for part in step.parts if part.request == other_index]
                    there.update(other.request.full_blocks[: ends[0] // size] if ends else ())
        blocks = served.request.full_blocks
        run_length = next((i for i, block in enumerate(blocks) if block not in there), len(blocks))
        expected = min(run_length * served.request.block_tokens, served.request.prompt_tokens - 1)
        assert served.cached_tokens == expected


@settings(max_examples=30)
@given(sources, engines)
def test_the_same_traffic_gives_the_same_replay(source: RequestSource, engine: Server) -> None:
    first, second = run(source, engine), run(source, engine)
    assert (first.steps, first.served) == (second.steps, second.served)


@given(small_traces(), engines)
def test_counted_forwards_are_the_steps_with_their_requests_in_one_order(trace: Trace, engine: Server) -> None:
    done = run(trace, engine)
    expected = Counter(
        tuple(sorted(((p.tokens, p.start + p.tokens) for p in step.parts), reverse=True)) for step in done.steps
    )
    assert {shape.requests: n for shape, n in done.forwards().items() if isinstance(shape, RaggedShape)} == expected
    full = sum(sum(p.tokens for p in step.parts) == engine.chunk_tokens for step in done.steps)
    assert done.full_share(engine.chunk_tokens) == (full / len(done.steps) if done.steps else 0.0)


def test_a_long_prompt_is_chunked_and_the_rest_of_a_chunk_goes_to_the_next_request() -> None:
    trace = Trace((Request(0.0, 25, 1), Request(0.0, 4, 1), Request(1000.0, 7, 1)))
    done = run(trace, Server(chunk_tokens=10, concurrency=8))
    assert [[(p.request, p.start, p.tokens) for p in step.parts] for step in done.steps] == [
        [(0, 0, 10)],
        [(0, 10, 10)],
        [(0, 20, 5), (1, 0, 4)],
        [(2, 0, 7)],
    ]
    assert done.steps[3].start_us == 1000.0


def test_a_repeated_prompt_computes_one_token_and_a_shared_prefix_what_follows_it() -> None:
    prompts = [
        Request(0.0, 24, 1, (1, 2, 3), 8),
        Request(900.0, 24, 1, (1, 2, 3), 8),
        Request(900.0, 20, 1, (1, 9, 4), 8),
    ]
    done = run(Trace(tuple(prompts)), Server(chunk_tokens=64))
    assert [served.cached_tokens for served in done.served] == [0, 23, 8]


def test_requests_that_decode_hold_the_others_back_until_one_is_done() -> None:
    trace = Trace((Request(0.0, 8, 5), Request(0.0, 8, 1)))
    one_place = run(trace, Server(chunk_tokens=8, concurrency=1, decode_us=100.0))
    assert one_place.served[1].admitted_us == one_place.served[0].finished_us == one_place.steps[0].end_us + 400.0
    two_places = run(trace, Server(chunk_tokens=8, concurrency=2, decode_us=100.0))
    assert two_places.steps[1].start_us == two_places.steps[0].end_us


def test_the_rest_of_the_model_takes_its_time_in_every_forward() -> None:
    trace = Trace((Request(0.0, 8, 1),))
    bare, whole = (run(trace, Server(rest_us=rest, rest_us_per_token=rest)).steps[0].end_us for rest in (0.0, 3.0))
    assert whole == bare + 3.0 + 8 * 3.0


@settings(max_examples=50)
@given(mixes)
def test_each_session_goes_on_from_all_that_was_said_until_its_turns_or_its_context_end(mix: AgentMix) -> None:
    done = run(Agents(mix), Server(chunk_tokens=32, concurrency=8))
    for session in range(mix.agents):
        turns = [served for served in done.served if served.request.session == session]
        assert 1 <= len(turns) <= mix.turns
        assert all(served.request.prompt_tokens <= mix.max_context for served in turns)
        for before, after in pairwise(turns):
            assert after.cached_tokens == before.request.prompt_tokens + before.request.output_tokens
            assert after.request.arrival_us >= before.finished_us
        last = turns[-1].request
        if len(turns) < mix.turns:
            assert last.prompt_tokens + last.output_tokens + math.ceil(1.5 * mix.turn_tokens) > mix.max_context


def test_sizes_of_an_agentic_mix_are_around_their_means() -> None:
    mix = AgentMix(40, 25, 1000, 100, 400, 1e6, 1 << 20, seed=3)
    requests = [served.request for served in run(Agents(mix), Server()).served]
    new = [request.prompt_tokens - request.own_prefix for request in requests if request.own_prefix]
    outputs = [request.output_tokens for request in requests]
    assert len(requests) == 1000
    assert sum(new) / len(new) == pytest.approx(100, rel=0.05)
    assert sum(outputs) / len(outputs) == pytest.approx(300, rel=0.05)
    other = AgentMix(40, 25, 1000, 100, 400, 1e6, 1 << 20, seed=4)
    assert requests != [served.request for served in run(Agents(other), Server()).served]


@pytest.mark.parametrize(
    "settings_of_engine",
    [
        {"chunk_tokens": 0},
        {"chunk_tokens": 1 << 25},
        {"concurrency": 0},
        {"concurrency": -3},
        {"rest_us": -1.0},
        {"rest_us_per_token": math.nan},
        {"decode_us": math.inf},
    ],
)
def test_a_server_that_cannot_be_is_refused_in_one_line(settings_of_engine: dict[str, float]) -> None:
    with pytest.raises(UsageError) as caught:
        Server(**settings_of_engine)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"agents": 0},
        {"turns": 0},
        {"turn_tokens": 0},
        {"growth": 10},
        {"pause_us": -1.0},
        {"pause_us": math.nan},
        {"first_prompt": 101},
        {"growth": 101},
        {"agents": 1 << 20},
    ],
)
def test_a_mix_that_cannot_be_is_refused_in_one_line(change: dict[str, float]) -> None:
    sound = {"agents": 2, "turns": 3, "first_prompt": 50, "turn_tokens": 10, "growth": 20, "pause_us": 0.0}
    with pytest.raises(UsageError) as caught:
        AgentMix(**{**sound, **change}, max_context=100)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
