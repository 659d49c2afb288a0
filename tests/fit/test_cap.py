"""A cap on workspace: no served choice needs more, except where nothing needs less."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.fit.cap import CappedCells, Frame, _most_bytes, capped_cells
from mla_tune.fit.costs import CostModel
from mla_tune.fit.objective import Objective
from mla_tune.fit.scope import Scope, scope
from mla_tune.fit.table_rows import FittedTable, fit_table
from mla_tune.fit.training import REQUEST_COUNTS, measured_range, training_grid
from mla_tune.fit.work import work
from mla_tune.fit.workspace_bytes import forward_bytes, workspace
from mla_tune.policy.decision import Decision
from mla_tune.policy.evidence import WorkspaceCap
from mla_tune.policy.schema import Choice, Row, Table, row_ends
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.served_shapes import ServedShape, Traffic
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import FORWARD, MODELS, SiteName
from mla_tune.store.measurement import Role
from tests.fit.recorded import recorded

MIB = 1 << 20
PLACES = (
    ("deepseek-v4-flash", "c4a", 64),
    ("deepseek-v4-flash", "c128a", 64),
    ("deepseek-v4-flash", FORWARD, 64),
    ("deepseek-v3.2", "dsa", 128),
)
SCOPES = [scope(SiteName.PREFILL_ATTENTION, MODELS[model], layer, h_q) for model, layer, h_q in PLACES]


@lru_cache(maxsize=1)
def h200() -> CostModel:
    found = recorded()
    return CostModel(found.environment, found.measurements, found.tries)


@lru_cache(maxsize=64)
def fitted(where: Scope, max_bytes: int | None) -> FittedTable:
    found = fit_table(h200(), where, objective=Objective(max_workspace_bytes=max_bytes))
    assert found is not None
    return found


def table(where: Scope, max_bytes: int | None) -> Table:
    return fitted(where, max_bytes).table


def cap_note(where: Scope, max_bytes: int | None) -> WorkspaceCap | None:
    return fitted(where, max_bytes).evidence.workspace_cap


def needed_bytes(where: Scope, candidate: str, shapes: list[Shape]) -> list[float]:
    parts = [workspace(site, candidate, work(site, shapes), 132) for site, _ in where.parts]
    return [float(count) for count in forward_bytes(parts)]


def beside_a_threshold(inside: Table, kv_tokens: int, num_reqs: int, rng: random.Random) -> int | None:
    """Query tokens at which a row is about to switch, or just has; None where it never does."""
    reqs_from = max(row.num_reqs_from for row in inside.rows if row.num_reqs_from <= num_reqs)
    group = [row for row in inside.rows if row.num_reqs_from == reqs_from]
    row = [row for row in group if row.kv_tokens_from <= kv_tokens][-1]
    counts = [choice.threshold.at(kv_tokens) for choice in row.choices[1:]]
    return rng.choice(counts) - rng.randrange(2) if counts else None


def random_shapes(where: Scope, inside: Table, count: int, seed: int) -> list[Shape]:
    """Inside the measured ranges, where rows decide: half of them beside a threshold, at any request count."""
    rng, measured = random.Random(seed), inside.measured
    found: list[Shape] = []
    while len(found) < count:
        reqs = round(measured.num_reqs[1] ** rng.random())
        kv_tokens = round(reqs * 64 * (where.model.max_context / 64) ** rng.random())
        tokens = round(measured.num_qo_tokens[1] ** rng.random())
        if len(found) % 2:
            tokens = beside_a_threshold(inside, kv_tokens, reqs, rng) or tokens
        low, high = measured.kv_tokens
        if reqs <= tokens <= kv_tokens and low <= kv_tokens <= high and tokens >= measured.num_qo_tokens[0]:
            found.append(Shape(reqs, tokens, kv_tokens))
    return found


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(SCOPES), st.sampled_from([16, 64, 200, 512, 1500, 4096]), st.integers(0, 2**32 - 1))
def test_no_served_choice_exceeds_the_cap_unless_nothing_is_surely_under_it(where: Scope, mib: int, seed: int) -> None:
    capped = table(where, mib * MIB)
    choose = Decision(capped).choose
    shapes = random_shapes(where, capped, 300, seed)
    own = {name: needed_bytes(where, name, shapes) for name in capped.candidates}
    # The far corner of any cell that a shape can lie in is at most this much larger.
    corners = [
        Shape(s.num_reqs, min(round(1.2 * s.num_qo_tokens) + 2, 2 * s.kv_tokens), 2 * s.kv_tokens) for s in shapes
    ]
    far = {name: needed_bytes(where, name, corners) for name in capped.candidates}
    for index, s in enumerate(shapes):
        chosen = choose(s.num_qo_tokens, s.kv_tokens, s.num_reqs)
        if own[chosen][index] > mib * MIB:
            assert chosen == capped.incumbent
            assert all(far[name][index] > mib * MIB for name in capped.candidates)


@pytest.mark.parametrize("where", SCOPES, ids=["/".join(map(str, place)) for place in PLACES])
def test_a_cell_is_bounded_by_its_corner_whatever_shape_is_in_it(where: Scope) -> None:
    plain = table(where, None)
    grid = training_grid(where.model.max_context, 132)
    frame = Frame.of(grid.bins, grid.groups, grid.tokens, plain.measured)
    shapes = random_shapes(where, plain, 2000, seed=1)
    bins = [int(np.searchsorted(frame.kv_ends, s.kv_tokens)) for s in shapes]
    columns = [int(np.searchsorted(frame.query_ends, s.num_qo_tokens)) for s in shapes]
    groups = [next(i for i, (low, high) in enumerate(frame.requests) if low <= s.num_reqs <= high) for s in shapes]
    for name in plain.candidates:
        bounds = _most_bytes(where, name, (132, None), frame)[groups, bins, columns]
        assert (bounds >= np.array(needed_bytes(where, name, shapes))).all()


def test_the_frame_covers_every_axis_without_gaps() -> None:
    grid = training_grid(1 << 20, 132)
    frame = Frame.of(grid.bins, grid.groups, grid.tokens, measured_range(list(grid.shapes)))
    assert frame.kv_starts[0] == 0
    assert (frame.kv_starts[1:] == frame.kv_ends[:-1] + 1).all()
    assert [low for low, _ in frame.requests] == [1, *(high + 1 for _, high in frame.requests[:-1])]
    assert [low <= count <= high for count, (low, high) in zip(REQUEST_COUNTS, frame.requests, strict=True)] == [
        True
    ] * 7


@pytest.mark.parametrize("where", SCOPES, ids=["/".join(map(str, place)) for place in PLACES])
def test_a_cap_above_everything_changes_nothing(where: Scope) -> None:
    plain, capped = fitted(where, None), fitted(where, 1 << 50)
    assert capped.table == plain.table
    assert capped.evidence.held_out == plain.evidence.held_out
    assert plain.evidence.workspace_cap is None
    assert capped.evidence.workspace_cap is not None
    assert (capped.evidence.workspace_cap.over, capped.evidence.workspace_cap.exempt) == (0, 0)


@pytest.mark.parametrize("where", SCOPES, ids=["/".join(map(str, place)) for place in PLACES])
def test_a_cap_below_everything_leaves_the_incumbent_and_says_where(where: Scope) -> None:
    capped = table(where, 1)
    only = Choice(candidate=capped.incumbent)
    assert [row.choices for row in capped.rows] == [(only,)] * len(capped.rows)
    note = cap_note(where, 1)
    assert note is not None
    assert note.exempt == note.over == note.shapes > 0


def test_a_lower_cap_bars_more() -> None:
    notes = [cap_note(SCOPES[0], mib * MIB) for mib in (4096, 1500, 512, 200, 64, 16)]
    over = [note.over for note in notes if note]
    exempt = [note.exempt for note in notes if note]
    assert over == sorted(over)
    assert exempt == sorted(exempt)
    assert over[0] < over[-1]


def test_a_cap_holds_under_traffic_that_would_choose_otherwise() -> None:
    """All the traffic lies where the candidate that the cap bars is the fastest by far."""
    where = SCOPES[0]
    shape = Shape(4, 8192, 524288)
    kinds = {name: needed_bytes(where, name, [shape])[0] for name in ("sparse_fwd", "with_kvcache")}
    plain = Decision(table(where, None)).choose(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)
    (other,) = kinds.keys() - {plain}
    below = int(kinds[plain]) - 1
    recorded = {ServedShape("prefill_attention", where.model.name, 8192, 524288, 4): 1000}
    capped = fit_table(h200(), where, objective=Objective(traffic=Traffic(recorded), max_workspace_bytes=below))
    assert capped is not None
    chosen = Decision(capped.table).choose(shape.num_qo_tokens, shape.kv_tokens, shape.num_reqs)
    assert chosen == (other if kinds[other] * 1.3 < below else capped.table.incumbent)


def test_tables_without_attention_have_no_cap() -> None:
    where = scope(SiteName.INDEXER_METADATA, MODELS["deepseek-v4-flash"], "c4a", None)
    assert cap_note(where, 1) is None
    assert table(where, 1).rows == table(where, None).rows


def test_rows_stay_valid_with_every_cap() -> None:
    for mib in (64, 512):
        rows: tuple[Row, ...] = table(SCOPES[0], mib * MIB).rows
        assert all(
            a.candidate != b.candidate for row in rows for a, b in zip(row.choices, row.choices[1:], strict=False)
        )


def cells_of_table(where: Scope, plain: Table, max_bytes: int) -> CappedCells:
    """The cells that :func:`table` was fitted on."""
    grid = training_grid(where.model.max_context, 132)
    mask = grid.inside(where.swept(h200().observations, Role.FIT))
    frame = Frame.of(grid.bins[mask], grid.groups[mask], grid.tokens, plain.measured)
    names = (plain.incumbent, *(name for name in plain.candidates if name != plain.incumbent))
    return capped_cells(where, dict.fromkeys(names, np.inf), max_bytes, (132, None), frame)


@pytest.mark.parametrize("mib", [64, 200, 512, 1500])
def test_no_row_reaches_into_a_barred_cell_with_the_thresholds_that_are_served(mib: int) -> None:
    where = SCOPES[1]
    capped = table(where, mib * MIB)
    cells = cells_of_table(where, capped, mib * MIB)
    assert cells.barred.any()
    starts = sorted({row.num_reqs_from for row in capped.rows})
    for row, end in zip(capped.rows, row_ends(capped), strict=True):
        later = [start for start in starts if start > row.num_reqs_from]
        members = [
            index
            for index, (low, _) in enumerate(cells.frame.requests)
            if low >= row.num_reqs_from and (not later or low < later[0])
        ]
        assert not cells.breaks(row, end, range(members[0], members[-1] + 1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_that_answers_a_barred_candidate_anywhere_is_found_out(data: st.DataObject) -> None:
    cells = cells_of_table(SCOPES[1], table(SCOPES[1], None), 200 * MIB)
    frame = cells.frame
    first = data.draw(st.integers(0, len(frame.kv_starts) - 1))
    last = data.draw(st.integers(first, len(frame.kv_starts) - 1))
    members = range(data.draw(st.integers(0, len(frame.requests) - 1)), len(frame.requests))
    ends = sorted(data.draw(st.tuples(st.integers(1, 40_000), st.integers(1, 40_000))))
    one, other = data.draw(st.permutations(cells.names))
    kv_start, kv_end = int(frame.kv_starts[first]), int(frame.kv_ends[last]) + 1
    line = Threshold.through((kv_start, kv_end), (ends[0], ends[1]))
    row = Row(kv_tokens_from=kv_start, choices=(Choice(candidate=one), Choice(threshold=line, candidate=other)))
    barred = np.asarray(cells.barred[members.start : members.stop].any(axis=0))

    def answers_a_barred(kv_tokens: int, tokens: int, name: str) -> bool:
        at = int(np.searchsorted(frame.kv_ends, kv_tokens)), cells.names.index(name)
        return bool(barred[(*at, min(int(np.searchsorted(frame.query_ends, tokens)), len(frame.tokens) - 1))])

    hits = [
        answers_a_barred(kv_tokens, tokens, name)
        for index in range(first, last + 1)
        for kv_tokens in (int(frame.kv_starts[index]), int(frame.kv_ends[index]))
        for at in [line.at(kv_tokens)]
        for tokens, name in [(max(at - 1, 0), one), (at, other), (1, one), (int(frame.query_ends[-1]), other)]
        if (name == one) == (tokens < at)
    ]
    if any(hits):
        assert cells.breaks(row, kv_end, members)
