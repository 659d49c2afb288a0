"""What a table answers: one tree of comparisons, compiled once.

The order of the rules:

1. inside the measured ranges the table's row and choice decide; outside them (any axis) the incumbent is kept;
2. a candidate past its limit is never answered: the incumbent takes its place, or else the first candidate of the table
   that may run there, one with slow first calls last.

The arguments are everywhere ``(num_qo_tokens, kv_tokens, num_reqs)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

from mla_tune.errors import PolicyError
from mla_tune.policy.schema import Row, Table, row_ends

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
class Leaf:
    """One leaf of a table's tree."""

    candidate: str
    reason: Reason
    row: int | None = None
    """Index of the table's row; None outside the measured ranges."""
    choice: int | None = None
    """Index of the row's choice."""


@dataclass(frozen=True, slots=True)
class ExplainedChoice:
    """One answer and the thresholds that led to it (None where no threshold was consulted)."""

    candidate: str
    reason: Reason
    num_reqs_from: int | None = None
    kv_tokens_from: int | None = None
    """With ``num_reqs_from`` the start of the table's row."""
    num_qo_tokens_from: int | None = None
    """Least query tokens of the choice at these context tokens."""
    choice: int | None = None
    """Index of the choice in its row."""


class Decision:
    """One table, ready to answer.

    Both functions are the same tree. It is compiled, as ``namedtuple`` compiles its constructor: a call into :mod:`bisect`
    alone costs more than all comparisons of a table together. The code holds integers and the names of its leaves.
    """

    __slots__ = ("answer", "choose", "table")

    answer: Callable[[int, int, int], Leaf]
    choose: Choose
    """:attr:`answer`'s candidate, by fewer comparisons: neighbours that answer alike are one."""

    def __init__(self, table: Table) -> None:
        """Raises :class:`PolicyError` where every candidate is past its limit."""
        self.table = table
        leaves: dict[Leaf, str] = {}
        tree = _table_tree(table, lambda answer: leaves.setdefault(answer, f"answer_{len(leaves)}"))
        self.answer = _compiled(tree, {name: answer for answer, name in leaves.items()})
        self.choose = _compiled(_table_tree(table, lambda answer: repr(answer.candidate)), {})

    def explain(self, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> ExplainedChoice:
        """What the table answers there, and by which threshold."""
        found = self.answer(num_qo_tokens, kv_tokens, num_reqs)
        if found.row is None or found.choice is None:
            return ExplainedChoice(found.candidate, found.reason)
        row = self.table.rows[found.row]
        threshold = row.choices[found.choice].threshold.at(kv_tokens)
        return ExplainedChoice(
            found.candidate, found.reason, row.num_reqs_from, row.kv_tokens_from, threshold, found.choice
        )


def constant(candidate: str) -> Choose:
    """The function that always answers ``candidate``."""
    return lambda num_qo_tokens, kv_tokens, num_reqs: candidate


_Part = tuple[str, str]
"""What is true below the start of a part of an axis, and the expression for that part."""


def _table_tree(table: Table, leaf: Callable[[Leaf], str]) -> str:
    tree = _Tree(table, leaf)
    groups = [list(rows) for _, rows in groupby(enumerate(table.rows), lambda entry: entry[1].num_reqs_from)]
    parts = [(rows[0][1].num_reqs_from, tree.group(rows)) for rows in groups]
    return _bounded("num_reqs", parts, table.measured.num_reqs, tree.outside)


class _Tree:
    """Builds the expression of one table; ``leaf`` writes down an answer."""

    def __init__(self, table: Table, leaf: Callable[[Leaf], str]) -> None:
        self._table, self._leaf = table, leaf
        self._ends = row_ends(table)
        self._low, high = table.measured.num_qo_tokens
        self._high = high + 1
        limits = (limit.num_qo_tokens + 1 for limit in table.limits)
        self._counts = sorted({self._low, self._high, *limits})
        """Query tokens at which the measured range or a limit changes what may be answered."""
        starts = [self._counts[0] - 1, *self._counts]
        self.outside = _tree([(f"num_qo_tokens < {start}", self._kept(start)) for start in starts])

    def group(self, rows: Sequence[tuple[int, Row]]) -> str:
        """The expression of the rows of one range of requests; each comes with its index."""
        parts = [(row.kv_tokens_from, self._row(index, row)) for index, row in rows]
        return _bounded("kv_tokens", parts, self._table.measured.kv_tokens, self.outside)

    def _row(self, index: int, row: Row) -> str:
        starts = [self._counts[0] - 1, *self._counts]
        parts: list[_Part] = []
        for start, end in zip(starts, [*self._counts, None], strict=True):
            test = f"num_qo_tokens < {start}"
            if not self._low <= start < self._high:
                parts.append((test, self._kept(start)))
                continue
            choices, within = self._choices(index, row, start, end)
            # A line that leaves the part somewhere along the row must not be tested before the part's own ends.
            parts += [(test, choices[0][1]), *choices[1:]] if within else [(test, _tree(choices))]
        return _tree(parts)

    def _choices(self, index: int, row: Row, start: int, end: int | None) -> tuple[list[_Part], bool]:
        """The choices that counts from ``start`` can meet, and whether all their thresholds stay inside up to ``end``."""
        low = max(row.kv_tokens_from, self._table.measured.kv_tokens[0])
        high = max(low, self._ends[index] - 1)
        lines = [choice.threshold for choice in row.choices]
        first = max(i for i, line in enumerate(lines) if i == 0 or line.at(high) <= start)
        last = max(i for i, line in enumerate(lines) if i == first or (end is None or line.at(low) < end))
        within = all(
            start <= line.at(low) and (end is None or line.at(high) <= end) for line in lines[first + 1 : last + 1]
        )
        parts = []
        for place in range(first, last + 1):
            candidate = row.choices[place].candidate
            served = self._served(candidate, start)
            reason = Reason.TABLE if served == candidate else Reason.LIMIT
            parts.append((lines[place].below(), self._leaf(Leaf(served, reason, index, place))))
        return parts, within

    def _kept(self, num_qo_tokens: int) -> str:
        """The incumbent, as far as its limit reaches."""
        incumbent = self._table.incumbent
        served = self._served(incumbent, num_qo_tokens)
        return self._leaf(Leaf(served, Reason.OUTSIDE if served == incumbent else Reason.LIMIT))

    def _served(self, candidate: str, num_qo_tokens: int) -> str:
        """``candidate``, or what takes its place past its limit."""
        table = self._table
        slow = {entry.candidate for entry in table.ineligible}  # a slow first call is still better than a failing one
        for name in (candidate, table.incumbent, *sorted(table.candidates, key=slow.__contains__)):
            if all(num_qo_tokens <= limit.num_qo_tokens for limit in table.limits if limit.candidate == name):
                return name
        limits = ", ".join(f"{limit.candidate} up to {limit.num_qo_tokens}" for limit in table.limits)
        raise PolicyError(
            f"a table must leave one candidate at every token count: got none above num_qo_tokens={num_qo_tokens - 1} "
            f"for {table.site} of {table.model}, layer {table.layer} (limits: {limits}); sweep another candidate and fit "
            "again"
        )


def _bounded(variable: str, parts: list[tuple[int, str]], measured: tuple[int, int], outside: str) -> str:
    """A tree over ``parts``, which start where they say, cut to the measured range."""
    low, high = measured
    first = [expression for start, expression in parts if start <= low][-1]
    inside = [(low, first), *((start, expression) for start, expression in parts if low < start <= high)]
    cuts = [(low - 1, outside), *inside, (high + 1, outside)]
    return _tree([(f"{variable} < {start}", expression) for start, expression in cuts])


def _tree(parts: Sequence[_Part]) -> str:
    """A balanced conditional expression over ascending parts; the first also takes everything below its start.

    Neighbours with the same expression are joined.
    """
    kept = [*parts[:1]]
    for below, expression in parts[1:]:
        if expression != kept[-1][1]:
            kept.append((below, expression))
    if len(kept) == 1:
        return kept[0][1]
    middle = len(kept) // 2
    return f"({_tree(kept[:middle])} if {kept[middle][0]} else {_tree(kept[middle:])})"


def _compiled(tree: str, names: dict[str, Leaf]) -> Any:
    code = compile(f"lambda num_qo_tokens, kv_tokens, num_reqs: {tree}", "<policy table>", "eval")
    return eval(code, {"__builtins__": {}, **names})
