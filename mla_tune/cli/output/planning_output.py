"""What ``plan`` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.table import Table as RichTable

from mla_tune.cli.output.render import console, header

if TYPE_CHECKING:
    from mla_tune.cli.answering import Answering
    from mla_tune.policy.schema import Table
    from mla_tune.replay.mixed import Mix, Outlook, Timed

GOAL, NEVER_BELOW = 1.15, 0.98
"""The gain on promised batches that splitting is meant to reach, and what no batch may fall below."""


@dataclass(frozen=True, slots=True)
class Told:
    """All that the command found."""

    answering: Answering
    table: Table
    """Of the model and heads."""
    layer: str
    mix: Mix
    seed: int
    predicted: Sequence[Outlook]
    measured: Sequence[tuple[Timed, ...] | None] | None
    """None where nothing was measured, or for a batch that has no split."""


def report(told: Told, as_json: bool) -> None:
    """Every batch, and the distributions of the gains."""
    if as_json:
        print(json.dumps(_json(told)))
        return
    header(told.answering)
    console.print(_model_line(told), highlight=False)
    console.print(_batches(told))
    for line in _summary(told):
        console.print(line, highlight=False)


def _model_line(told: Told) -> str:
    table, mix, sku = told.table, told.mix, told.answering.policy.gpu.sku
    return (
        f"{table.model}, h_q {table.h_q}, layers {told.layer}, {sku}, seed {told.seed}: one fresh prompt of "
        f"{_range(mix.fresh_tokens)} tokens among {_range(mix.extends)} extends of {_range(mix.new_tokens)} new tokens on "
        f"{_range(mix.context_tokens)} cached ones, each uniform in its logarithm and cut at the model's context; every "
        "fifth batch is a control"
    )


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]} to {ends[1]}"


def _batches(told: Told) -> RichTable:
    columns = ["batch", "requests", "query tokens", "context tokens", "best single", "us", "from cache", "predicted"]
    measured = ["measured", "split, promised or not", "right"] if told.measured is not None else []
    rows = RichTable(*columns, *measured)
    for index, outlook in enumerate(told.predicted):
        batch = outlook.batch
        sizes = (
            len(batch.requests),
            sum(r.num_qo_tokens for r in batch.requests),
            sum(r.kv_tokens for r in batch.requests),
        )
        best = ", ".join(dict.fromkeys(entry.plan.best_single for entry in outlook.layers))
        cached = ", ".join(f"{e.layer} {len(e.plan.parts[1].requests)}" for e in outlook.layers if e.promised)
        line = [batch.kind, *map(str, sizes), best, f"{outlook.single_us:.0f}", cached or "-", f"{outlook.gain:.3f}"]
        if told.measured is not None:
            line += _measured_cells(outlook, told.measured[index])
        rows.add_row(*line)
    return rows


def _measured_cells(outlook: Outlook, timed: tuple[Timed, ...] | None) -> list[str]:
    if timed is None:
        return ["-", "-", "-"]
    gains = (outlook.measured_gain(timed), outlook.measured_split_gain(timed))
    faults = [fault for t in timed for fault in t.faults]
    return [*("-" if gain is None else f"{gain:.3f}" for gain in gains), "; ".join(faults) or "yes"]


def _summary(told: Told) -> list[str]:
    from mla_tune.replay.mixed import Gains

    promised = [outlook.gain for outlook in told.predicted if outlook.promised]
    reached = sum(gain >= GOAL for gain in promised)
    lines = [
        f"promised: {len(promised)} of {len(told.predicted)} batches are split, {reached} with a predicted gain of at "
        f"least {GOAL}: {_gains_text(Gains.of(promised))}"
    ]
    if told.measured is None:
        return [
            *lines,
            "predicted from the measurements behind the policy, the launches and moved rows of both parts in it",
        ]
    for what, least in (("promised", 1.0), (f"promised {GOAL} or more", GOAL)):
        gains = _measured_gains(told, least)
        lines.append(f"measured where {what}: {_gains_text(Gains.of(gains))}")
    everywhere = _measured_gains(told, 0.0)
    below = sum(gain < NEVER_BELOW for gain in everywhere)
    lines.append(f"plans below {NEVER_BELOW} of the fastest single path as measured: {below} of {len(everywhere)}")
    wrong = sum(any(t.faults for t in timed or ()) for timed in told.measured)
    return [*lines, f"batches at which a path failed or differed from the reference: {wrong}"]


def _measured_gains(told: Told, least: float) -> list[float]:
    """Measured gains of plans that promised ``least``; above 0 of splits only."""
    return [
        gain
        for outlook, timed in zip(told.predicted, told.measured or (), strict=True)
        if timed and (not least or (outlook.promised and outlook.gain >= least))
        if (gain := outlook.measured_gain(timed)) is not None
    ]


def _gains_text(gains: object) -> str:
    from mla_tune.replay.mixed import Gains

    if not isinstance(gains, Gains):
        return "none"
    return (
        f"{gains.batches} batches, geometric mean {gains.geomean:.3f}, worst {gains.worst:.3f}, best {gains.best:.3f}"
    )


def _json(told: Told) -> dict[str, object]:
    from mla_tune.replay.mixed import Gains

    def told_of(index: int, outlook: Outlook) -> dict[str, object]:
        timed = told.measured[index] if told.measured is not None else None
        return {
            "kind": outlook.batch.kind,
            "requests": [[r.num_qo_tokens, r.kv_tokens] for r in outlook.batch.requests],
            "layers": [asdict(entry) for entry in outlook.layers],
            "predicted_gain": outlook.gain,
            "measured": None if timed is None else [asdict(t) for t in timed],
            "measured_gain": None if timed is None else outlook.measured_gain(timed),
            "measured_split_gain": None if timed is None else outlook.measured_split_gain(timed),
        }

    def gains(values: list[float]) -> dict[str, object] | None:
        found = Gains.of(values)
        return None if found is None else asdict(found)

    return {
        "model": told.table.model,
        "h_q": told.table.h_q,
        "layer": told.layer,
        "gpu": told.answering.policy.gpu.sku,
        "answered_by": told.answering.as_json(),
        "seed": told.seed,
        "mix": asdict(told.mix),
        "batches": [told_of(index, outlook) for index, outlook in enumerate(told.predicted)],
        "promised": gains([outlook.gain for outlook in told.predicted if outlook.promised]),
        "measured": gains(_measured_gains(told, 1.0)) if told.measured is not None else None,
        "measured_where_goal_promised": gains(_measured_gains(told, GOAL)) if told.measured is not None else None,
    }
