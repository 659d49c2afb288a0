"""The line in (query tokens, context tokens) from which a choice is taken, in exact integers."""

from __future__ import annotations

from math import gcd

import msgspec


class Threshold(msgspec.Struct, frozen=True):
    """Reached by ``num_qo_tokens`` at or above the line through two points, of which it goes exactly."""

    num_qo_tokens: tuple[int, int]
    """Query tokens at each of :attr:`kv_tokens`; the second is never below the first."""
    kv_tokens: tuple[int, int] = (0, 1)
    """Context tokens of the two points, ascending; for a level line they say nothing."""

    @classmethod
    def level(cls, num_qo_tokens: int) -> Threshold:
        """The same count at every context."""
        return cls((num_qo_tokens, num_qo_tokens))

    @classmethod
    def through(cls, kv_tokens: tuple[int, int], num_qo_tokens: tuple[int, int]) -> Threshold:
        """From the first count at the first context to the second at the second; level where that does not rise."""
        rises = num_qo_tokens[0] < num_qo_tokens[1] and kv_tokens[0] < kv_tokens[1]
        return cls(num_qo_tokens, kv_tokens) if rises else cls.level(num_qo_tokens[0])

    @property
    def is_level(self) -> bool:
        """Whether the context plays no role."""
        return self.num_qo_tokens[0] == self.num_qo_tokens[1]

    def at(self, kv_tokens: int) -> int:
        """Least query tokens that reach the line."""
        rise, run, offset = self._line()
        return -(-(kv_tokens * rise + offset) // run)

    def is_below(self, other: Threshold, kv_tokens: int) -> bool:
        """Whether this line is below ``other``'s there, to the fraction of a token, which no count need hit."""
        (rise, run, offset), (other_rise, other_run, other_offset) = self._line(), other._line()
        return (kv_tokens * rise + offset) * other_run < (kv_tokens * other_rise + other_offset) * run

    def below(self) -> str:
        """The Python expression that is true below the line."""
        rise, run, offset = self._line()
        if not rise:
            return f"num_qo_tokens < {offset}"
        qo = "num_qo_tokens" if run == 1 else f"num_qo_tokens * {run}"
        kv = "kv_tokens" if rise == 1 else f"kv_tokens * {rise}"
        return f"{qo} < {kv} {'+-'[offset < 0]} {abs(offset)}"

    def _line(self) -> tuple[int, int, int]:
        """(rise, run, offset): the line is at ``(kv_tokens * rise + offset) / run`` query tokens."""
        first, last = self.num_qo_tokens
        if first == last:
            return 0, 1, first
        rise, run = last - first, self.kv_tokens[1] - self.kv_tokens[0]
        common = gcd(rise, run)
        rise, run = rise // common, run // common
        return rise, run, first * run - self.kv_tokens[0] * rise
