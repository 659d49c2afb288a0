"""Everything that a report shows of one GPU, as plain values: the page and the picture draw these and compute nothing.

One GPU may have several policies: one for each provider, whose kernels run around attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from mla_tune.fit.costs import CostModel
from mla_tune.fit.evaluation import held_out_points, rules, table_scope
from mla_tune.fit.scope import Scope
from mla_tune.policy.evidence import PolicyEvidence, TableEvidence
from mla_tune.policy.schema import Policy, Table
from mla_tune.report.boundary import areas, crossings, request_ranges
from mla_tune.report.measured_points import MeasuredPoint, measured_points, significant
from mla_tune.report.modelled_cells import ModelledCell, modelled_cells
from mla_tune.report.palette import unit_words
from mla_tune.report.stage_plots import StagePlot, stage_plots
from mla_tune.report.typed_rules import typed_rules
from mla_tune.report.wins import Win, modelled_win, win
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import Provider
from mla_tune.sites.site import FORWARD

_ENGINES = {
    Engine.SGLANG: "SGLang",
    Engine.VLLM: "vLLM",
    Engine.VLLM_FEW_HEADS: "vLLM with few heads a rank",
    Engine.OWN: "mla-tune's own variants",
}


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredPolicy:
    """One policy of the GPU, and the measurements that it was made from."""

    policy: Policy
    digest: str
    """SHA-256 of the policy file."""
    file: str
    """Its name."""
    evidence: PolicyEvidence | None
    costs: CostModel


class Region(msgspec.Struct, frozen=True):
    """An area of one candidate; its corners are (query tokens, context tokens)."""

    candidate: int
    corners: tuple[tuple[int, int], ...]


class Boundary(msgspec.Struct, frozen=True, kw_only=True):
    """One threshold, from the least to the most context of its row."""

    before: int
    after: int
    kv_tokens: tuple[int, ...]
    num_qo_tokens: tuple[int, ...]
    bracket: tuple[tuple[int, int], ...]
    win: tuple[float, float] | None


class RuleLine(msgspec.Struct, frozen=True, kw_only=True):
    """One typed constant; its two ends are (query tokens, context tokens)."""

    label: str
    meaning: str
    ends: tuple[tuple[float, float], ...]


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What one range of request counts has of its own."""

    num_reqs: tuple[int, int]
    """Both ends inside."""
    kv_tokens: tuple[int, int]
    """Contexts inside the measured range that so many requests of the model can have."""
    regions: tuple[Region, ...]
    boundaries: tuple[Boundary, ...]
    typed_rules: tuple[RuleLine, ...]
    cells: tuple[ModelledCell, ...]
    """Of a modelled policy; otherwise none."""


class JudgedPoint(msgspec.Struct, frozen=True, array_like=True):
    """One held-out point: requests, query tokens, context tokens, and the slowdown of every rule."""

    num_reqs: int
    num_qo_tokens: int
    kv_tokens: int
    slowdowns: tuple[float, ...]


class CandidateBound(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one candidate beyond its steady cost."""

    candidate: str
    limit: int | None
    """Most query tokens that it may serve; None where no probe found an end."""
    fails_at: int | None
    found_by: str
    reason: str
    first_call_s: float
    """Seconds that the first call at a new query token count takes."""
    barred: bool
    """Its first call takes longer than a server may wait: no row names it."""


class SiteMap(msgspec.Struct, frozen=True, kw_only=True):
    """One table of one policy, with all that was measured for it."""

    policy: int
    """Index in :attr:`Contents.policies`."""
    site: str
    model: str
    h_q: int | None
    layer: str
    engine: str
    engine_words: str
    incumbent: int
    """Index of the engine's own choice."""
    candidates: tuple[str, ...]
    num_qo_tokens: tuple[int, int]
    """MeasuredPolicy range, as the next two; outside of them the engine's choice is kept."""
    kv_tokens: tuple[int, int]
    noise_band: float | None
    views: tuple[View, ...]
    points: tuple[MeasuredPoint, ...]
    rules: tuple[str, ...]
    """Names of the rules that the held-out points judge."""
    judged: tuple[JudgedPoint, ...]
    bounds: tuple[CandidateBound, ...]
    censored: tuple[str, ...]
    """Ranges whose paths cross outside of what was measured."""
    win: Win
    stages: tuple[int, ...]
    """Indices in :attr:`Contents.stages`."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where one policy comes from."""

    file: str
    sha256: str
    provider: str
    """As the toggle names it."""
    is_own: bool
    """Whether that is this project."""
    modelled_from: str | None
    regime: str
    source: str
    """File of the measurements."""
    source_sha256: str
    measurements: int
    command: str
    environment: tuple[tuple[str, str], ...]
    """What was measured on: a name and a value each."""
    uncertainty: tuple[float, float] | None
    """Least and most that a modelled cost may be off by, as factors; None of a measured policy."""


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """A whole report."""

    sku: str
    sm_count: int
    policies: tuple[Origin, ...]
    maps: tuple[SiteMap, ...]
    stages: tuple[StagePlot, ...]


def contents(found: Sequence[MeasuredPolicy], wanted: Callable[[Table], bool] = lambda _: True) -> Contents:
    """The report on the tables of ``found`` that are wanted, all policies of one GPU. Equal input gives an equal value."""
    maps: list[SiteMap] = []
    stages: list[StagePlot] = []
    for index, measured in enumerate(found):
        places: dict[tuple[str, str], list[int]] = {}
        for table in filter(wanted, measured.policy.tables):
            where = table_scope(table, measured.costs.observations.conditions)
            maps.append(_site_map(measured, index, table, where, _stages(measured, table, where, stages, places)))
    policy = found[0].policy
    return Contents(
        sku=policy.gpu.sku,
        sm_count=policy.gpu.sm_count,
        policies=tuple(_origin(measured) for measured in found),
        maps=tuple(maps),
        stages=tuple(stages),
    )


def _stages(
    measured: MeasuredPolicy,
    table: Table,
    where: Scope,
    stages: list[StagePlot],
    places: dict[tuple[str, str], list[int]],
) -> tuple[int, ...]:
    """Indices in ``stages`` of the table's, which are added where no table before had them."""
    indices: list[int] = []
    for site, _ in where.parts:
        for name in table.candidates:
            key = site.key, name
            if key not in places:
                plots = stage_plots(measured.costs, [site], (name,))
                places[key] = list(range(len(stages), len(stages) + len(plots)))
                stages.extend(plots)
            indices += places[key]
    return tuple(indices)


def _site_map(measured: MeasuredPolicy, index: int, table: Table, where: Scope, stages: tuple[int, ...]) -> SiteMap:
    costs, evidence = measured.costs, measured.evidence.of(table) if measured.evidence else None
    modelled = measured.policy.scaled_from is not None
    points = () if modelled else measured_points(costs.observations, where, table)
    views = tuple(_view(measured, table, where, evidence, num_reqs) for num_reqs in request_ranges(table))
    cells = [cell for view in views for cell in view.cells]
    return SiteMap(
        policy=index,
        site=table.site,
        model=table.model,
        h_q=table.h_q,
        layer=table.layer,
        engine=table.engine,
        engine_words=_ENGINES[table.engine],
        incumbent=table.candidates.index(table.incumbent),
        candidates=table.candidates,
        num_qo_tokens=table.measured.num_qo_tokens,
        kv_tokens=table.measured.kv_tokens,
        noise_band=evidence.noise_band if evidence else None,
        views=views,
        points=points,
        rules=() if modelled else tuple(name for name, _ in rules(table)),
        judged=() if modelled else tuple(_judged(costs, table)),
        bounds=tuple(_bound(costs, table, where, evidence, name) for name in table.candidates),
        censored=tuple(_censored(table, evidence)),
        win=modelled_win(table, cells) if modelled else win(table, points),
        stages=stages,
    )


def _view(
    measured: MeasuredPolicy, table: Table, where: Scope, evidence: TableEvidence | None, num_reqs: tuple[int, int]
) -> View:
    place = {name: index for index, name in enumerate(table.candidates)}
    modelled = measured.policy.scaled_from is not None
    low, high = table.measured.kv_tokens
    most = max(low, min(high, where.model.max_context * num_reqs[1]))
    return View(
        num_reqs=num_reqs,
        kv_tokens=(low, most),
        regions=tuple(Region(place[area.candidate], area.outline()) for area in areas(table, num_reqs[0], most)),
        boundaries=tuple(
            Boundary(
                before=place[found.before],
                after=place[found.after],
                kv_tokens=found.kv_tokens,
                num_qo_tokens=found.num_qo_tokens,
                bracket=found.bracket,
                win=found.win,
            )
            for found in crossings(table, evidence, num_reqs[0], most)
        ),
        typed_rules=tuple(
            RuleLine(label=rule.label, meaning=rule.meaning, ends=rule.ends(table.measured.num_qo_tokens, (low, most)))
            for rule in typed_rules(table.site)
        ),
        cells=modelled_cells(measured.costs, table, where, evidence, num_reqs) if modelled else (),
    )


def _judged(costs: CostModel, table: Table) -> Iterator[JudgedPoint]:
    for point in held_out_points(costs.observations, table):
        shape = point.shape
        slowdowns = tuple(significant(slowdown) for slowdown in point.slowdowns)
        yield JudgedPoint(shape.num_reqs, shape.num_qo_tokens, shape.kv_tokens, slowdowns)


def _bound(costs: CostModel, table: Table, where: Scope, evidence: TableEvidence | None, name: str) -> CandidateBound:
    limit = next((entry.num_qo_tokens for entry in table.limits if entry.candidate == name), None)
    proof = next((entry for entry in evidence.limits if entry.candidate == name), None) if evidence else None
    first_calls = [costs.observations.first_call_s(site, name) for site, _ in where.parts]
    return CandidateBound(
        candidate=name,
        limit=limit,
        fails_at=proof.fails_at if proof and limit is not None else None,
        found_by=proof.found_by if proof and limit is not None else "",
        reason=proof.reason if proof and limit is not None else "",
        first_call_s=significant(max(first_calls)),
        barred=any(entry.candidate == name for entry in table.ineligible),
    )


def _censored(table: Table, evidence: TableEvidence | None) -> Iterator[str]:
    for row in evidence.rows if evidence else ():
        if row.censored is not None:
            reqs = f"from {max(row.num_reqs_from, table.measured.num_reqs[0])} requests"
            yield (
                f"{reqs}, from {max(row.kv_tokens_from, table.measured.kv_tokens[0])} context tokens: the paths cross "
                f"{row.censored} the measured query tokens"
            )


def _origin(measured: MeasuredPolicy) -> Origin:
    policy = measured.policy
    off = (
        [entry.relative for table in measured.evidence.tables for entry in table.uncertainty]
        if measured.evidence
        else []
    )
    environment = policy.environment
    libraries = ((library.name, f"{library.version} ({library.sha256[:12]})") for library in environment.libraries)
    return Origin(
        file=measured.file,
        sha256=measured.digest,
        provider=_provider(policy),
        is_own=policy.provider is None,
        modelled_from=policy.scaled_from,
        regime=policy.regime,
        source=policy.source.file,
        source_sha256=policy.source.sha256,
        measurements=policy.source.measurements,
        command=policy.source.command,
        environment=(
            ("GPU", f"{policy.gpu.sku}, {policy.gpu.sm_count} {unit_words(policy.gpu.sku)}"),
            ("driver", environment.driver),
            ("CUDA", environment.cuda),
            ("torch", environment.torch),
            ("triton", environment.triton),
            *libraries,
        ),
        uncertainty=(min(off), max(off)) if policy.scaled_from and off else None,
    )


def _provider(policy: Policy) -> str:
    if policy.provider is None:
        return "mla-tune's kernels"
    found = Provider.parse(policy.provider)
    return f"{'SGLang' if found.name == 'sglang' else found.name} {found.version}'s kernels"


def is_whole_forward(entry: SiteMap) -> bool:
    """Whether the map is of a whole forward, which mixes layer types."""
    return entry.layer == FORWARD
