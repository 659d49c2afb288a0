"""One table's decision, and its compiled form.

:func:`decide` says what a table answers and why; :func:`compile_table` writes the same comparisons down once, so that
serving costs a few of them. The order of the rules is :func:`decide`'s:

1. inside the measured ranges the table's row and choice decide; outside them (any axis) the incumbent is kept;
2. a candidate past one of its limits is never answered: the incumbent takes its place, or else the first candidate of
   the table that may run there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, pairwise

import msgspec

from mla_tune.errors import PolicyError
from mla_tune.policy.schema import Choice, Row, Table
from mla_tune.policy.threshold import Threshold

Choose = Callable[[int, int, int], str]
"""``choose(num_qo_tokens, kv_tokens, num_reqs)`` -> candidate name; total over all integers."""


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
    num_reqs_from: int | None = None
    kv_tokens_from: int | None = None
    """With ``num_reqs_from`` the start of the table's row."""
    num_qo_tokens_from: int | None = None
    """Least query tokens of the choice at these context tokens."""
    bracket: tuple[int, int] | None = None
    """Query tokens at these context tokens between which the crossover to that choice lies."""


class Span(msgspec.Struct, frozen=True):
    """A row and the context tokens at which it ends."""

    row: Row
    kv_tokens_end: int

    def threshold(self, choice: Choice) -> Threshold:
        """From where ``choice`` is taken."""
        end = choice.num_qo_tokens_from if choice.num_qo_tokens_to is None else choice.num_qo_tokens_to
        return Threshold.through((self.row.kv_tokens_from, self.kv_tokens_end), (choice.num_qo_tokens_from, end))


def spans(table: Table) -> list[list[Span]]:
    """The rows of ``table``, those of one ``num_reqs_from`` together; the last of each ends with the measured range."""
    end = table.measured.kv_tokens[1] + 1
    groups = [list(rows) for _, rows in groupby(table.rows, lambda row: row.num_reqs_from)]
    return [
        [Span(row, following.kv_tokens_from) for row, following in pairwise(rows)] + [Span(rows[-1], end)]
        for rows in groups
    ]


def decide(table: Table, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> Explanation:
    """What ``table`` answers. Raises :class:`PolicyError` where every candidate is past its limit."""
    q_low, q_high = table.measured.num_qo_tokens
    kv_low, kv_high = table.measured.kv_tokens
    reqs_low, reqs_high = table.measured.num_reqs
    found = Explanation(table.incumbent, Reason.OUTSIDE)
    if q_low <= num_qo_tokens <= q_high and kv_low <= kv_tokens <= kv_high and reqs_low <= num_reqs <= reqs_high:
        found = _by_row(_span(table, kv_tokens, num_reqs), num_qo_tokens, kv_tokens)
    answer = _answer(table, found.candidate, num_qo_tokens)
    if answer == found.candidate:
        return found
    return Explanation(
        answer, Reason.LIMIT, found.num_reqs_from, found.kv_tokens_from, found.num_qo_tokens_from, found.bracket
    )


def _by_row(span: Span, num_qo_tokens: int, kv_tokens: int) -> Explanation:
    row = span.row
    for choice in reversed(row.choices):
        threshold = span.threshold(choice).at(kv_tokens)
        if num_qo_tokens >= threshold:
            break
    bracket = None
    if choice.bracket is not None:
        bracket = math.floor(threshold * choice.bracket[0]), math.ceil(threshold * choice.bracket[1])
    return Explanation(choice.candidate, Reason.TABLE, row.num_reqs_from, row.kv_tokens_from, threshold, bracket)


def _span(table: Table, kv_tokens: int, num_reqs: int) -> Span:
    group = [group for group in spans(table) if group[0].row.num_reqs_from <= num_reqs][-1]
    return [span for span in group if span.row.kv_tokens_from <= kv_tokens][-1]


def _answer(table: Table, candidate: str, num_qo_tokens: int) -> str:
    """``candidate``, or what takes its place past its limit."""
    if _may_run(table, candidate, num_qo_tokens):
        return candidate
    barred = {entry.candidate for entry in table.ineligible}  # a slow first call is still better than a failing one
    for other in (table.incumbent, *sorted(table.candidates, key=barred.__contains__)):
        if _may_run(table, other, num_qo_tokens):
            return other
    limits = ", ".join(f"{limit.candidate} up to {limit.num_qo_tokens}" for limit in table.limits)
    raise PolicyError(
        f"a table must leave one candidate at every token count: got none above num_qo_tokens={num_qo_tokens - 1} for "
        f"{table.site} of {table.model}, layer {table.layer} (limits: {limits}); sweep another candidate and fit again"
    )


def _may_run(table: Table, candidate: str, num_qo_tokens: int) -> bool:
    return all(num_qo_tokens <= limit.num_qo_tokens for limit in table.limits if limit.candidate == candidate)


def compile_table(table: Table) -> Choose:
    """:func:`decide` as one expression of comparisons. Raises :class:`PolicyError` where no candidate may run.

    The expression is compiled, as ``namedtuple`` compiles its constructor: a call into :mod:`bisect` alone costs more
    than all comparisons of a table together. It holds nothing but integers and candidate names.
    """
    outside = _by_counts(table, lambda tokens: repr(_answer(table, table.incumbent, tokens)))
    groups = [(group[0].row.num_reqs_from, _group_tree(table, group, outside)) for group in spans(table)]
    tree = _bounded("num_reqs", groups, table.measured.num_reqs, outside)
    code = compile(f"lambda num_qo_tokens, kv_tokens, num_reqs: {tree}", "<policy table>", "eval")
    choose: Choose = eval(code, {"__builtins__": {}})
    return choose


def _group_tree(table: Table, group: list[Span], outside: str) -> str:
    rows = [(span.row.kv_tokens_from, _row_tree(table, span, outside)) for span in group]
    return _bounded("kv_tokens", rows, table.measured.kv_tokens, outside)


def _row_tree(table: Table, span: Span, outside: str) -> str:
    q_low, q_high = table.measured.num_qo_tokens
    if all(limit.num_qo_tokens >= q_high for limit in table.limits) and _inside(table, span):
        choices = [(span.threshold(choice).below(), repr(choice.candidate)) for choice in span.row.choices]
        return _cut("num_qo_tokens", choices, (q_low, q_high), outside)

    def at(tokens: int) -> str:
        if not q_low <= tokens <= q_high:
            return repr(_answer(table, table.incumbent, tokens))
        choices = span.row.choices
        return _tree([(span.threshold(c).below(), repr(_answer(table, c.candidate, tokens))) for c in choices])

    return _by_counts(table, at)


def _inside(table: Table, span: Span) -> bool:
    """Whether every threshold of a row lies inside the measured counts, all along the row."""
    q_low, q_high = table.measured.num_qo_tokens
    thresholds = [span.threshold(choice) for choice in span.row.choices[1:]]
    start, end = span.row.kv_tokens_from, max(span.kv_tokens_end, span.row.kv_tokens_from)
    return all(q_low <= line.at(start) and line.at(end) <= q_high for line in thresholds)


def _by_counts(table: Table, expression: Callable[[int], str]) -> str:
    """A tree over the query token counts at which the measured range or a limit changes what may be answered."""
    q_low, q_high = table.measured.num_qo_tokens
    starts = {0, q_low, q_high + 1, *(limit.num_qo_tokens + 1 for limit in table.limits)}
    return _tree([(f"num_qo_tokens < {start}", expression(start)) for start in sorted(starts)])


def _bounded(variable: str, segments: list[tuple[int, str]], measured: tuple[int, int], outside: str) -> str:
    """A tree over ``segments``, cut to the measured range."""
    low, high = measured
    first = [expression for start, expression in segments if start <= low][-1]
    inside = [(low, first), *((start, expression) for start, expression in segments if low < start <= high)]
    return _cut(variable, [(f"{variable} < {start}", expression) for start, expression in inside], measured, outside)


def _cut(variable: str, segments: Sequence[tuple[str, str]], measured: tuple[int, int], outside: str) -> str:
    """A tree over segments inside a measured range whose ends only the outer segments ask for."""
    found = list(segments)
    test, expression = found[0]
    if expression != outside:
        found[0] = (test, f"({outside} if {variable} < {measured[0]} else {expression})")
    test, expression = found[-1]
    if expression != outside:
        found[-1] = (test, f"({expression} if {variable} < {measured[1] + 1} else {outside})")
    return _tree(found)


def _tree(segments: Sequence[tuple[str, str]]) -> str:
    """A balanced conditional expression over ascending segments: (what is true below its start, expression) pairs.

    Neighbours with the same expression are joined; the first segment also takes everything below its start.
    """
    kept = [*segments[:1]]
    for below, expression in segments[1:]:
        if expression != kept[-1][1]:
            kept.append((below, expression))
    if len(kept) == 1:
        return kept[0][1]
    middle = len(kept) // 2
    return f"({_tree(kept[:middle])} if {kept[middle][0]} else {_tree(kept[middle:])})"


def constant(candidate: str) -> Choose:
    """The function that always answers ``candidate``."""
    return lambda num_qo_tokens, kv_tokens, num_reqs: candidate
