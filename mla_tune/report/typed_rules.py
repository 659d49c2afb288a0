"""The constants that engines' authors typed in, as lines over (query tokens, context tokens)."""

from __future__ import annotations

from dataclasses import dataclass

from mla_tune.fit.evaluation import HAND_WRITTEN_RATIO, HAND_WRITTEN_THRESHOLD

NONPAGED_ROWS = 8192
"""Query tokens from which SGLang 0.5.23 takes the nonpaged kernel for the indexer's logits. Also a common prefill chunk: a
server that is started with it has no larger forward."""


@dataclass(frozen=True, slots=True)
class TypedRule:
    """One line: a count of query tokens, or context tokens a query token."""

    label: str
    """Beside the line."""
    meaning: str
    """One sentence: who has it, and what it says."""
    num_qo_tokens: int | None = None
    ratio: int | None = None

    def ends(self, query: tuple[int, int], context: tuple[int, int]) -> tuple[tuple[float, float], ...]:
        """Two points (query tokens, context tokens) of it inside a box; none where it stays outside."""
        if self.num_qo_tokens is not None:
            inside = query[0] <= self.num_qo_tokens <= query[1]
            return ((self.num_qo_tokens, context[0]), (self.num_qo_tokens, context[1])) if inside else ()
        ratio = self.ratio or 1
        low, high = max(query[0], context[0] / ratio), min(query[1], context[1] / ratio)
        return ((low, low * ratio), (high, high * ratio)) if low < high else ()


_LARGE_QUERIES = TypedRule(
    f"{HAND_WRITTEN_THRESHOLD} query tokens",
    f"SGLang's _LARGE_INDEXER_QUERY_THRESHOLD: the other kernel above {HAND_WRITTEN_THRESHOLD} query tokens",
    num_qo_tokens=HAND_WRITTEN_THRESHOLD,
)
_RATIO = TypedRule(
    f"context = {HAND_WRITTEN_RATIO} x query tokens",
    f"SGLang's rule for V3.2 (flashmla_auto): sparse_fwd where the context is below {HAND_WRITTEN_RATIO} x query tokens",
    ratio=HAND_WRITTEN_RATIO,
)
_CHUNK = TypedRule(
    f"{NONPAGED_ROWS}: a full chunk",
    f"{NONPAGED_ROWS} query tokens: a common prefill chunk (--chunked-prefill-size), and no rule about this site",
    num_qo_tokens=NONPAGED_ROWS,
)
_NONPAGED = TypedRule(
    f"{NONPAGED_ROWS} query tokens",
    f"SGLang 0.5.23 takes the nonpaged logits kernel from {NONPAGED_ROWS} query tokens up, for one request",
    num_qo_tokens=NONPAGED_ROWS,
)
_BY_SITE = {
    "prefill_attention": (_LARGE_QUERIES, _RATIO, _CHUNK),
    "indexer_metadata": (_LARGE_QUERIES, _CHUNK),
    "indexer_logits": (_NONPAGED,),
}


def typed_rules(site: str) -> tuple[TypedRule, ...]:
    """The lines that are drawn on maps of ``site``; none for a site without such a constant."""
    return _BY_SITE.get(site, ())
