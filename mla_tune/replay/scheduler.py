"""A server's scheduler, replayed: continuous batching with a prefix cache, chunked prefill and a bound on concurrency.

First come, first served. Whenever a prompt can be worked on, the next forward is a prefill: it takes up to
``chunk_tokens`` new tokens, first from the prompt that an earlier forward left unfinished, then from waiting requests, as
long as fewer than ``concurrency`` are in the server. Otherwise all finished prompts decode one token each. A decode step
is no prefill forward; it takes time and keeps its requests' places. With ``decode_us`` 0 answers are made elsewhere
(prefill apart from decode): a request leaves its place with its prompt done.

The prefix cache is unbounded: a prompt finds its longest run of leading blocks that any earlier forward has computed, or
what its own session has. Answers are in it for the latter only, since a trace has no ids for them. At least the last token
of a prompt is computed in any case. How long a forward takes is the caller's ``clock``'s to say.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mla_tune.errors import UsageError
from mla_tune.replay.requests import Request, RequestSource
from mla_tune.sites.shape import AnyShape, RaggedShape

MAX_REST_US = 1e9
"""Longest time of anything that a server does at once: a quarter of an hour is none that serves."""

Clock = Callable[[RaggedShape], float]
"""``clock(forward)`` -> microseconds of its attention and indexer."""


@dataclass(frozen=True, slots=True)
class Server:
    """How the server is set."""

    chunk_tokens: int = 8192
    """Most query tokens of one forward."""
    concurrency: int = 64
    """Most requests that are in the server at a time, prompts under way and answers being decoded together."""
    rest_us: float = 0.0
    """Time of the rest of the model in every prefill forward."""
    rest_us_per_token: float = 0.0
    """The same for each of its query tokens."""
    decode_us: float = 0.0
    """Time of one decode step, whatever its batch; 0 where another server decodes."""

    def __post_init__(self) -> None:
        if not (1 <= self.chunk_tokens <= 1 << 24 and 1 <= self.concurrency <= 1 << 16):
            raise UsageError(
                "a server must take 1 to 16777216 tokens a forward and 1 to 65536 requests: "
                f"got chunk_tokens={self.chunk_tokens}, concurrency={self.concurrency}"
            )
        for name in ("rest_us", "rest_us_per_token", "decode_us"):
            value: float = getattr(self, name)
            if not 0 <= value <= MAX_REST_US:
                raise UsageError(
                    f"{name} must be microseconds, at least 0: got {value}; accepted: 0 to {MAX_REST_US:g}"
                )


@dataclass(frozen=True, slots=True)
class Part:
    """One request's share of a forward."""

    request: int
    """Index in :attr:`Replay.served`."""
    start: int
    """Tokens of its context that were there before."""
    tokens: int
    """New tokens that the forward computes."""


@dataclass(frozen=True, slots=True)
class Step:
    """One prefill forward."""

    start_us: float
    end_us: float
    parts: tuple[Part, ...]

    def shape(self) -> RaggedShape:
        """The forward as the cost model sees it, its requests in descending order: their order costs nothing."""
        return RaggedShape(tuple(sorted(((p.tokens, p.start + p.tokens) for p in self.parts), reverse=True)))


@dataclass(slots=True)
class Served:
    """One request and what became of it."""

    request: Request
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had when it was admitted."""
    admitted_us: float = math.nan
    prefilled_us: float = math.nan
    finished_us: float = math.nan


@dataclass(frozen=True, slots=True)
class Replay:
    """Everything that happened."""

    steps: tuple[Step, ...]
    served: tuple[Served, ...]
    """Every request, in the order of arrival."""

    def forwards(self) -> Counter[AnyShape]:
        """Distinct prefill forwards with how often each occurred, in the order of their first occurrence."""
        return Counter(step.shape() for step in self.steps)

    def full_share(self, chunk_tokens: int) -> float:
        """Share of the prefill forwards that are full chunks; 0 for none."""
        full = sum(sum(part.tokens for part in step.parts) == chunk_tokens for step in self.steps)
        return full / len(self.steps) if self.steps else 0.0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(served.request.prompt_tokens for served in self.served)

    @property
    def cached_tokens(self) -> int:
        """Those of them that were in the prefix cache."""
        return sum(served.cached_tokens for served in self.served)


def replay(source: RequestSource, engine: Server, clock: Clock) -> Replay:
    """Serve everything that ``source`` brings."""
    server = _Server(source, engine, clock)
    while server.go_on():
        pass
    return Replay(tuple(server.steps), tuple(server.served))


@dataclass(slots=True)
class _Prompt:
    """A request whose prompt is under way."""

    index: int
    request: Request
    done: int
    """Tokens of the prompt that are there."""


@dataclass(slots=True)
class _Server:
    source: RequestSource
    engine: Server
    clock: Clock
    now_us: float = 0.0
    steps: list[Step] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    _arrivals: list[tuple[float, int, Request]] = field(default_factory=list)
    """A heap: (arrival, order of becoming known, request)."""
    _known: int = 0
    _waiting: deque[int] = field(default_factory=deque)
    _prompts: deque[_Prompt] = field(default_factory=deque)
    _decoding: list[tuple[int, int]] = field(default_factory=list)
    """A heap: (decode step at which the answer is complete, index)."""
    _decoded: int = 0
    """Decode steps so far."""
    _cache: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for request in self.source.arrivals():
            self._expect(request)

    def _expect(self, request: Request) -> None:
        heapq.heappush(self._arrivals, (request.arrival_us, self._known, request))
        self._known += 1

    def go_on(self) -> bool:
        """Do the next thing; false where nothing is left to do."""
        while self._arrivals and self._arrivals[0][0] <= self.now_us:
            self._waiting.append(len(self.served))
            self.served.append(Served(heapq.heappop(self._arrivals)[2]))
        if parts := self._next_forward():
            self._prefill(parts)
        elif self._decoding:
            self._decode()
        elif self._arrivals:
            self.now_us = self._arrivals[0][0]
        else:
            return False
        return True

    def _next_forward(self) -> list[tuple[_Prompt, int]]:
        """Prompts with the tokens that the next forward computes of each; empty where there is nothing to prefill."""
        budget = self.engine.chunk_tokens
        parts: list[tuple[_Prompt, int]] = []
        for prompt in self._prompts:
            budget -= self._take(prompt, budget, parts)
        while budget and self._waiting and len(self._prompts) + len(self._decoding) < self.engine.concurrency:
            prompt = self._admit(self._waiting.popleft())
            budget -= self._take(prompt, budget, parts)
        return parts

    @staticmethod
    def _take(prompt: _Prompt, budget: int, parts: list[tuple[_Prompt, int]]) -> int:
        tokens = min(budget, prompt.request.prompt_tokens - prompt.done)
        if tokens:
            parts.append((prompt, tokens))
        return tokens

    def _admit(self, index: int) -> _Prompt:
        served = self.served[index]
        request = served.request
        matched = 0
        for block in request.full_blocks:
            if block not in self._cache:
                break
            matched += 1
        found = max(request.own_prefix, matched * request.block_tokens)
        served.cached_tokens = min(found, request.prompt_tokens - 1)
        served.admitted_us = self.now_us
        prompt = _Prompt(index, request, served.cached_tokens)
        self._prompts.append(prompt)
        return prompt

    def _prefill(self, parts: list[tuple[_Prompt, int]]) -> None:
        step = Step(self.now_us, 0.0, tuple(Part(prompt.index, prompt.done, tokens) for prompt, tokens in parts))
        shape = step.shape()
        rest_us = self.engine.rest_us + self.engine.rest_us_per_token * shape.num_qo_tokens
        self.now_us += self.clock(shape) + rest_us
        self.steps.append(Step(step.start_us, self.now_us, step.parts))
        for prompt, tokens in parts:
            prompt.done += tokens
            size = prompt.request.block_tokens
            self._cache.update(prompt.request.full_blocks[(prompt.done - tokens) // size : prompt.done // size])
        while self._prompts and self._prompts[0].done == self._prompts[0].request.prompt_tokens:
            self._answer(self._prompts.popleft())

    def _answer(self, prompt: _Prompt) -> None:
        """The prompt is done, and with it the first token of the answer."""
        self.served[prompt.index].prefilled_us = self.now_us
        left = prompt.request.output_tokens - 1
        if self.engine.decode_us and left > 0:
            heapq.heappush(self._decoding, (self._decoded + left, prompt.index))
        else:
            self._finish(prompt.index)

    def _decode(self) -> None:
        """Decode until an answer is complete, or a new request can come in."""
        steps = self._decoding[0][0] - self._decoded
        if self._arrivals and len(self._decoding) < self.engine.concurrency:
            until = math.ceil((self._arrivals[0][0] - self.now_us) / self.engine.decode_us)
            steps = min(steps, max(1, until))
        self._decoded += steps
        self.now_us += steps * self.engine.decode_us
        while self._decoding and self._decoding[0][0] <= self._decoded:
            self._finish(heapq.heappop(self._decoding)[1])

    def _finish(self, index: int) -> None:
        served = self.served[index]
        served.finished_us = self.now_us
        following = self.source.after(served.request, self.now_us)
        if following is not None:
            self._expect(following)
