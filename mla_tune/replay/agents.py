"""A made-up agentic mix: sessions whose context grows turn by turn, while each turn brings few new tokens.

Every session begins with a prompt of its own; each later turn extends its context by what the model had answered and by
the new tokens that the next forward has to compute (a tool's output). The next turn arrives a pause after the last one
has ended. Sizes and pauses are drawn from a seed, so that equal mixes give equal traffic.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from mla_tune.errors import UsageError
from mla_tune.replay.requests import Request

_MAX_TURNS = 1 << 20


@dataclass(frozen=True, slots=True)
class AgentMix:
    """The parameters of the mix."""

    agents: int
    """Sessions at the same time."""
    turns: int
    """Turns of each of them, the first prompt included."""
    first_prompt: int
    """Mean tokens of the first prompt of a session."""
    turn_tokens: int
    """Mean new prompt tokens of each later turn: what its forward computes."""
    growth: int
    """Mean tokens by which a context grows per turn: the new ones, and the answer before them."""
    pause_us: float
    """Mean pause between the end of a turn and the next, exponentially distributed."""
    max_context: int
    """A session ends early before its context would pass this."""
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (self.agents, self.turns, self.first_prompt, self.turn_tokens)
        if min(sizes) < 1 or self.growth <= self.turn_tokens or not 0 <= self.pause_us < float("inf"):
            raise UsageError(
                "an agentic mix must have agents, turns, a first prompt and turn tokens of at least 1, a growth "
                f"above the turn tokens and a pause of at least 0: got {self}"
            )
        if self.agents * self.turns > _MAX_TURNS:
            raise UsageError(
                f"an agentic mix must have at most {_MAX_TURNS} turns in all: got {self.agents * self.turns}"
            )
        if max(self.first_prompt, self.growth) > self.max_context:
            raise UsageError(
                f"a first prompt and a turn's growth must fit the model's context of {self.max_context} tokens: "
                f"got {self.first_prompt} and {self.growth}"
            )


@dataclass(slots=True)
class Agents:
    """The requests of a mix, for one replay. A :class:`mla_tune.replay.requests.RequestSource`."""

    mix: AgentMix
    _rngs: list[random.Random] = field(default_factory=list)
    _turns: list[int] = field(default_factory=list)

    def arrivals(self) -> Sequence[Request]:
        """The first prompt of each session, the sessions' starts spread over one pause."""
        mix = self.mix
        # A stream for each session: what one draws must not depend on the order in which others end.
        self._rngs = [random.Random(f"{mix.seed}/{session}") for session in range(mix.agents)]
        self._turns = [1] * mix.agents
        return [
            Request(
                arrival_us=rng.random() * mix.pause_us,
                prompt_tokens=min(_around(rng, mix.first_prompt), mix.max_context),
                output_tokens=_around(rng, mix.growth - mix.turn_tokens),
                session=session,
            )
            for session, rng in enumerate(self._rngs)
        ]

    def after(self, request: Request, now_us: float) -> Request | None:
        """The session's next turn; None after its last, or where its context is full."""
        mix, session = self.mix, request.session
        if self._turns[session] == mix.turns:
            return None
        self._turns[session] += 1
        rng = self._rngs[session]
        pause_us = rng.expovariate(1.0) * mix.pause_us
        new_tokens, output_tokens = _around(rng, mix.turn_tokens), _around(rng, mix.growth - mix.turn_tokens)
        known = request.prompt_tokens + request.output_tokens
        if known + new_tokens > mix.max_context:
            return None
        return Request(
            arrival_us=now_us + pause_us,
            prompt_tokens=known + new_tokens,
            output_tokens=output_tokens,
            own_prefix=known,
            session=session,
        )


def _around(rng: random.Random, mean: int) -> int:
    """A size of this mean, uniform between its half and one and a half of it: spread, and never far off."""
    return max(1, round(mean * (0.5 + rng.random())))
