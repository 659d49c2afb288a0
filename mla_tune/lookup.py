"""One table's decision, and its compiled form.

:func:`decide` says what a table answers and why; :func:`compile_table` asks it once per segment and keeps only the
answers, so that serving costs a few comparisons. The order of the rules is theirs:

1. inside the measured ranges the table's row and choice decide; outside them (either axis) the incumbent is kept;
2. a candidate past one of its limits is never answered: the incumbent takes its place, or else the first candidate of
   the table that may run there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from mla_tune.errors import PolicyError
from mla_tune.policy import Row, Table

Choose = Callable[[int, int], str]
"""``choose(num_qo_tokens, kv_tokens)`` -> candidate name; total over all integers."""


class Reason(StrEnum):
    """Why a candidate was answered."""

    TABLE = "table"
    OUTSIDE = "outside measured range"
    LIMIT = "limit"
    FALLBACK = "fallback"
    PIN = "pin"


@dataclass(frozen=True, slots=True)
class Explanation:
    """One answer and the thresholds that led to it (None where no threshold was consulted)."""

    candidate: str
    reason: Reason
    kv_tokens_from: int | None = None
    """Start of the table's row."""
    num_qo_tokens_from: int | None = None
    """Start of the row's choice."""
    bracket: tuple[int, int] | None = None
    """Where the crossover to that choice lies; see :class:`mla_tune.policy.Choice`."""


def decide(table: Table, num_qo_tokens: int, kv_tokens: int) -> Explanation:
    """What ``table`` answers. Raises :class:`PolicyError` where every candidate is past its limit."""
    q_low, q_high = table.measured.num_qo_tokens
    kv_low, kv_high = table.measured.kv_tokens
    if q_low <= num_qo_tokens <= q_high and kv_low <= kv_tokens <= kv_high:
        row = _row(table, kv_tokens)
        choice = [choice for choice in row.choices if choice.num_qo_tokens_from <= num_qo_tokens][-1]
        found = Explanation(
            choice.candidate, Reason.TABLE, row.kv_tokens_from, choice.num_qo_tokens_from, choice.bracket
        )
    else:
        found = Explanation(table.incumbent, Reason.OUTSIDE)
    if _may_run(table, found.candidate, num_qo_tokens):
        return found
    barred = {entry.candidate for entry in table.ineligible}  # a slow first call is still better than a failing one
    for candidate in (table.incumbent, *sorted(table.candidates, key=barred.__contains__)):
        if _may_run(table, candidate, num_qo_tokens):
            return Explanation(candidate, Reason.LIMIT, found.kv_tokens_from, found.num_qo_tokens_from, found.bracket)
    limits = ", ".join(f"{limit.candidate} up to {limit.num_qo_tokens}" for limit in table.limits)
    raise PolicyError(
        f"a table must leave one candidate at every token count: got none above num_qo_tokens={num_qo_tokens - 1} for "
        f"{table.site} of {table.model}, layer {table.layer} (limits: {limits}); sweep another candidate and fit again"
    )


def _row(table: Table, kv_tokens: int) -> Row:
    return [row for row in table.rows if row.kv_tokens_from <= kv_tokens][-1]


def _may_run(table: Table, candidate: str, num_qo_tokens: int) -> bool:
    return all(num_qo_tokens <= limit.num_qo_tokens for limit in table.limits if limit.candidate == candidate)


def compile_table(table: Table) -> Choose:
    """:func:`decide` as one expression of integer comparisons. Raises :class:`PolicyError` where no candidate may run.

    The expression is compiled, as ``namedtuple`` compiles its constructor: a call into :mod:`bisect` alone costs more
    than all comparisons of a table together. It holds nothing but integers and candidate names.
    """
    kv_low, kv_high = table.measured.kv_tokens
    kv_starts = {row.kv_tokens_from for row in table.rows} | {kv_low, kv_high + 1}
    tree = _tree("kv_tokens", [(start, _row_tree(table, start)) for start in sorted(kv_starts)])
    code = compile(f"lambda num_qo_tokens, kv_tokens: {tree}", "<policy table>", "eval")
    choose: Choose = eval(code, {"__builtins__": {}})
    return choose


def _row_tree(table: Table, kv_tokens: int) -> str:
    q_low, q_high = table.measured.num_qo_tokens
    starts = {choice.num_qo_tokens_from for choice in _row(table, kv_tokens).choices} | {q_low, q_high + 1}
    starts |= {limit.num_qo_tokens + 1 for limit in table.limits}
    return _tree(
        "num_qo_tokens", [(start, repr(decide(table, start, kv_tokens).candidate)) for start in sorted(starts)]
    )


def _tree(variable: str, segments: list[tuple[int, str]]) -> str:
    """A balanced conditional expression over ``segments``: (start, expression) pairs, ascending.

    Neighbours with the same expression are joined; the first segment also takes everything below its start.
    """
    kept = segments[:1]
    for start, expression in segments[1:]:
        if expression != kept[-1][1]:
            kept.append((start, expression))
    if len(kept) == 1:
        return kept[0][1]
    middle = len(kept) // 2
    return (
        f"({_tree(variable, kept[:middle])} if {variable} < {kept[middle][0]:d} else {_tree(variable, kept[middle:])})"
    )


def constant(candidate: str) -> Choose:
    """The function that always answers ``candidate``."""
    return lambda num_qo_tokens, kv_tokens: candidate
