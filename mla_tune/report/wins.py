"""What one table wins over the engine's own choice, as one sentence that says what it rests on."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from mla_tune.policy.decision import Decision
from mla_tune.policy.schema import Table
from mla_tune.report.measured_points import MeasuredPoint, significant
from mla_tune.report.modelled_cells import ModelledCell

_SAME = 1.01
"""Two processes' timings of one kernel differ by up to this: see :data:`mla_tune.fit.interval.LEAST_DIFFERENCE`."""


class Win(msgspec.Struct, frozen=True, kw_only=True):
    """The policy against the engine's default, over shapes that are spread evenly over the logarithms of their sizes."""

    shapes: int
    """Measured shapes (of a modelled table: shapes of a grid) inside the measured range at which both ran."""
    other_path: int
    """Those at which the policy answers another path than the default."""
    slower: int
    """Those of them at which it is slower by more than two processes differ."""
    mean: float
    """Geometric mean of default over policy where it answers another path; 1 where it never does."""
    best: float
    """The largest of them."""
    sentence: str


def win(table: Table, points: Sequence[MeasuredPoint]) -> Win:
    """By the medians of every measured point, those that the fit saw among them."""
    default = table.candidates.index(table.incumbent)
    ratios = []
    shapes = 0
    for point in points:
        if not table.measured.holds(point.num_qo_tokens, point.kv_tokens, point.num_reqs):
            continue
        mine, theirs = point.costs[point.answer], point.costs[default]
        if mine is None or theirs is None:
            continue
        shapes += 1
        if point.answer != default:
            ratios.append(theirs.latency_us / mine.latency_us)
    return _win(table, shapes, ratios, "measured")


def modelled_win(table: Table, cells: Sequence[ModelledCell]) -> Win:
    """The same by predicted costs, over a grid of shapes."""
    decision = Decision(table)
    default = table.candidates.index(table.incumbent)
    ratios = []
    for cell in cells:
        answer = table.candidates.index(decision.choose(cell.num_qo_tokens, cell.kv_tokens, cell.num_reqs))
        if answer != default:
            ratios.append(cell.latencies_us[default] / cell.latencies_us[answer])
    return _win(table, len(cells), ratios, "modelled")


def _win(table: Table, shapes: int, ratios: list[float], kind: str) -> Win:
    mean = float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0
    slower = sum(ratio < 1 / _SAME for ratio in ratios)
    best = max(ratios, default=1.0)
    return Win(
        shapes=shapes,
        other_path=len(ratios),
        slower=slower,
        mean=significant(mean),
        best=significant(best),
        sentence=_sentence(table.incumbent, shapes, len(ratios), slower, (mean, best), kind),
    )


def _sentence(default: str, shapes: int, other: int, slower: int, gains: tuple[float, float], kind: str) -> str:
    if not shapes:
        return f"Nothing can be compared: at no {kind} shape did all paths run."
    if not other:
        return f"Nothing to win: the policy keeps the engine's default, {default}, at all {shapes} {kind} shapes."
    mean, best = gains
    start = f"At {other} of {shapes} {kind} shapes the policy takes another path than the engine's default, {default}"
    verb = "is" if kind == "measured" else "would be"
    text = f"{start}. There it {verb} {mean:.2f}x faster in the geometric mean, {best:.2f}x at best"
    return f"{text}, and more than 1 % slower at {slower}." if slower else f"{text}, and slower nowhere."
