"""The line in (query tokens, context tokens) at which a row switches its candidate, in exact integers."""

from __future__ import annotations

import msgspec


class Threshold(msgspec.Struct, frozen=True):
    """``num_qo_tokens * per >= kv_tokens + offset``, as SGLang's rule for V3.2 has it; ``per`` 0: a constant count."""

    per: int
    """Context tokens by which the threshold rises by one query token, to the nearest integer."""
    offset: int
    """Of a constant: minus the count."""

    @classmethod
    def through(cls, kv_tokens: tuple[int, int], num_qo_tokens: tuple[int, int]) -> Threshold:
        """From the first count at the first context to nearly the second at the second; constant where none rises."""
        rise, run = num_qo_tokens[1] - num_qo_tokens[0], kv_tokens[1] - kv_tokens[0]
        if rise <= 0 or run <= 0:
            return cls(0, -num_qo_tokens[0])
        per = max(1, (2 * run + rise) // (2 * rise))
        return cls(per, num_qo_tokens[0] * per - kv_tokens[0])

    def at(self, kv_tokens: int) -> int:
        """Least query tokens that reach the threshold."""
        return -(-(kv_tokens + self.offset) // self.per) if self.per else -self.offset

    def is_below(self, other: Threshold, kv_tokens: int) -> bool:
        """Whether this line is below ``other``'s there, to the fraction of a token, which no count need hit."""
        (above, per), (other_above, other_per) = self._exactly_at(kv_tokens), other._exactly_at(kv_tokens)
        return above * other_per < other_above * per

    def _exactly_at(self, kv_tokens: int) -> tuple[int, int]:
        return (kv_tokens + self.offset, self.per) if self.per else (-self.offset, 1)

    def below(self) -> str:
        """The Python expression that is true below the threshold."""
        if not self.per:
            return f"num_qo_tokens < {-self.offset}"
        return f"num_qo_tokens * {self.per} < kv_tokens {'+-'[self.offset < 0]} {abs(self.offset)}"
