"""What arrives at a server: requests, and the sources that they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its answer."""

    arrival_us: float
    prompt_tokens: int
    """At least one."""
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks, in order: two prompts whose first ids are equal share that prefix."""
    block_tokens: int = 512
    """Tokens of one block."""
    own_prefix: int = 0
    """Leading tokens that the server has from this request's own session, answers included."""
    session: int = field(default=-1, compare=False)
    """Which of a source's sessions it belongs to, for a source that has any."""

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """Ids of the blocks that the prompt fills: the last one may be filled in part, and is then of no use to others."""
        return self.blocks[: self.prompt_tokens // self.block_tokens]


class RequestSource(Protocol):
    """Where requests come from."""

    def arrivals(self) -> Sequence[Request]:
        """Requests whose time of arrival is known beforehand."""
        ...

    def after(self, request: Request, now_us: float) -> Request | None:
        """The request that the end of ``request`` at ``now_us`` brings; None for none. Asked once for each."""
        ...
