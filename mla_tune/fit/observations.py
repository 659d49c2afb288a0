"""Measurements, ordered and indexed as the fit and the evaluation ask for them.

The order in which measurements arrive never matters: everything here is sorted first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from mla_tune.sites.candidates import names_at, stages
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import PLAIN, Conditions, ModelConfig, Site, SiteName
from mla_tune.sites.stages import Amortization
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import (
    PER_FORWARD_TOTAL,
    PER_LAYER_TOTAL,
    Measurement,
    Outcome,
    Regime,
    Role,
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one candidate takes at one shape, by how often it is paid, in microseconds."""

    per_layer_us: float
    per_layer_type_us: float
    per_forward_us: float

    def amortized(self, shares: Shares) -> float:
        """Microseconds per layer once the parts that layers share are spread over them."""
        return (
            self.per_layer_us
            + self.per_layer_type_us * shares.of(Amortization.PER_LAYER_TYPE)
            + self.per_forward_us * shares.of(Amortization.PER_FORWARD)
        )


@dataclass(frozen=True, slots=True)
class Shares:
    """Which part of a stage one layer pays."""

    per_layer_type: float
    per_forward: float

    def of(self, amortization: Amortization) -> float:
        """Share of a stage of this class."""
        if amortization is Amortization.PER_LAYER_TYPE:
            return self.per_layer_type
        return self.per_forward if amortization is Amortization.PER_FORWARD else 1.0


def shares(model: ModelConfig, site: Site) -> Shares:
    """Shares at one site of a model. Metadata has no per-layer part: its cost is quoted whole, not spread."""
    if site.name is SiteName.INDEXER_METADATA:
        return Shares(1.0, 1.0)
    return Shares(1 / model.layer_count(site.layer), 1 / model.num_layers)


_RESOLUTION_US = 0.1
"""Least time that a part counts for: a stage timed as a difference of two calls may come out at zero or below."""

# The first that occurs at a point names its outcome: what says most about the kernel comes first.
_SEVERITY = (
    Outcome.WRONG_RESULT,
    Outcome.CRASH,
    Outcome.RUNTIME_ERROR,
    Outcome.COMPILE_ERROR,
    Outcome.TIMEOUT,
    Outcome.NO_MEMORY,
    Outcome.DISTURBED,
    Outcome.UNSUPPORTED,
)


class Observations:
    """All measurements of one environment, in the regime that the policy minimizes.

    That is ``regime``; by default the GPU's time where it was measured. A sweep leaves host-inclusive times out at points
    whose kernels take milliseconds, since some 70 us of launches are lost in them: there the GPU's time stands for both.
    """

    def __init__(
        self,
        measurements: Iterable[Measurement],
        tries: Iterable[Try] = (),
        regime: Regime | None = None,
        architecture: str | None = None,
    ) -> None:
        """``measurements`` share their conditions, as :func:`mla_tune.fit.usable.usable` sees to."""
        self.architecture = architecture
        """Of the GPU, as :func:`mla_tune.hardware.datasheet.architecture` names it; None where no rule depends on it."""
        self._tries: dict[tuple[Site, str], list[Try]] = {}
        for attempt in sorted(tries, key=lambda attempt: attempt.key):
            self._tries.setdefault((attempt.site.overlapping(0), attempt.candidate), []).append(attempt)
        ordered = sorted(measurements, key=_order)
        self.measurements = len(ordered)
        """How many there are, of any outcome and regime."""
        self.regimes = frozenset(m.regime for m in ordered if m.outcome is Outcome.OK)
        """Those in which anything was timed."""
        self.regime = regime or (Regime.GRAPH if Regime.GRAPH in self.regimes else Regime.EAGER)
        asked = {(m.site, m.shape) for m in ordered if m.regime is self.regime and m.outcome is Outcome.OK}
        self._candidates: dict[Site, tuple[str, ...]] = {}
        """What :meth:`candidates` found: a report and a fit ask at every shape."""
        self._parts: dict[tuple[Site, str, Shape], dict[str, Measurement]] = {}
        self._failures: dict[tuple[Site, str, Shape], Measurement] = {}
        self._roles: dict[Site, dict[Shape, Role]] = {}
        for m in ordered:
            point = (m.site, m.candidate, m.shape)
            self._roles.setdefault(m.site, {})[m.shape] = m.role
            if m.outcome is not Outcome.OK:
                first = self._failures.setdefault(point, m)
                if _SEVERITY.index(m.outcome) < _SEVERITY.index(first.outcome):
                    self._failures[point] = m
            elif m.regime is self.regime or (self.regime is Regime.EAGER and (m.site, m.shape) not in asked):
                self._parts.setdefault(point, {})[m.part] = m

    @property
    def conditions(self) -> Conditions:
        """What the measurements assume: the overlap of neighbouring selections, and whose kernels ran."""
        overlap = max((site.overlap for site in self._roles), default=0)
        return Conditions(overlap, next((site.provider for site in self._roles), None))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites at which anything was attempted, by key."""
        return tuple(sorted(self._roles, key=lambda site: site.key))

    def shapes(self, site: Site, role: Role | None = None) -> list[Shape]:
        """Shapes at which anything was attempted, sorted."""
        return sorted(s for s, r in self._roles.get(site, {}).items() if role is None or r is role)

    def tries(self, site: Site, candidate: str) -> list[Try]:
        """A probe's tries, ordered by shape. What runs is a matter of sizes: the selections of neighbours play no role.

        Nor does a provider for a kernel that it does not replace, as FlashMLA's and DeepGEMM's are.
        """
        found = self._tries.get((site.overlapping(0), candidate), [])
        plain = PLAIN.at(site)
        if site.provider is None or any(stage.run_by(site) == str(site.provider) for stage in stages(plain, candidate)):
            return found
        return sorted([*found, *self._tries.get((plain, candidate), [])], key=lambda attempt: attempt.key)

    def candidates(self, site: Site) -> tuple[str, ...]:
        """Candidates with at least one whole timing among the fit points, sorted."""
        if site not in self._candidates:
            shapes = self.shapes(site, Role.FIT)
            ran = (c for c in names_at(site) if any(self.cost(site, c, s) is not None for s in shapes))
            self._candidates[site] = tuple(ran)
        return self._candidates[site]

    def part(self, site: Site, candidate: str, shape: Shape, name: str) -> Measurement | None:
        """The successful measurement of one part; a group of one stage is its own total."""
        parts = self._parts.get((site, candidate, shape), {})
        if name in parts or name not in (PER_LAYER_TOTAL, PER_FORWARD_TOTAL):
            return parts.get(name)
        members = group(site, candidate, name)
        return parts.get(members[0]) if len(members) == 1 else None

    def latencies(self, site: Site, candidate: str, name: str) -> tuple[list[Shape], list[float]]:
        """Fit points at which one part was timed: their shapes and latencies in microseconds."""
        pairs = [(s, _latency_us(self.part(site, candidate, s, name))) for s in self.shapes(site, Role.FIT)]
        timed = [(s, us) for s, us in pairs if us is not None]
        return [s for s, _ in timed], [us for _, us in timed]

    def cost(self, site: Site, candidate: str, shape: Shape) -> Cost | None:
        """Measured whole-path cost; None unless every whole timing that the candidate has succeeded here."""
        totals = {}
        for name in (PER_LAYER_TOTAL, PER_FORWARD_TOTAL):
            us = _latency_us(self.part(site, candidate, shape, name)) if group(site, candidate, name) else 0.0
            if us is None:
                return None
            totals[name] = us
        shared_us = totals[PER_FORWARD_TOTAL]
        once = self._once_per_forward_share(site, candidate, shape)
        if once is None:
            return None
        return Cost(totals[PER_LAYER_TOTAL], shared_us * (1 - once), shared_us * once)

    def cost_range(self, site: Site, candidate: str, shape: Shape, shares: Shares) -> tuple[float, float] | None:
        """Ends of the amortized whole-path cost's confidence interval, microseconds; None where there is no cost.

        The intervals of the whole timings are added end to end, which covers at least what each of them covers.
        """
        cost = self.cost(site, candidate, shape)
        if cost is None:
            return None
        per_layer = self.part(site, candidate, shape, PER_LAYER_TOTAL)
        shared = self.part(site, candidate, shape, PER_FORWARD_TOTAL)
        shared_us = cost.per_layer_type_us + cost.per_forward_us
        weight = (cost.amortized(shares) - cost.per_layer_us) / shared_us if shared_us else 0.0
        ends = [(1.0, per_layer), (weight, shared)]
        low, high = (
            sum(factor * (_end_us(part, name) if part else 0.0) for factor, part in ends) for name in ("low", "high")
        )
        return low, high

    def _once_per_forward_share(self, site: Site, candidate: str, shape: Shape) -> float | None:
        """Share of the per-forward total that all layer types share, by the stages timed one by one."""
        kinds = {
            s.name: s.amortization for s in stages(site, candidate) if s.amortization is not Amortization.PER_LAYER
        }
        if len(set(kinds.values())) < 2:
            return float(Amortization.PER_FORWARD in kinds.values())
        total_us = once_us = 0.0
        for name, amortization in kinds.items():
            us = _latency_us(self.part(site, candidate, shape, name))
            if us is None:
                return None
            total_us += us
            once_us += us if amortization is Amortization.PER_FORWARD else 0.0
        return once_us / total_us

    def failure(self, site: Site, candidate: str, shape: Shape) -> Measurement | None:
        """Why the candidate has no cost here; None if it has one, or if nothing was recorded."""
        if self.cost(site, candidate, shape) is not None:
            return None
        return self._failures.get((site, candidate, shape))

    def first_call_s(self, site: Site, candidate: str) -> float:
        """What the first call at a new query token count costs, in seconds; 0 where none was recorded.

        At each count the slowest first call, and of those the median: a library that compiles once in a process shows it
        at one count, one that compiles for every new shape shows it at most. All layer types count, since what one of them
        compiled the next finds in the cache.
        """
        slowest: dict[int, float] = {}
        for (measured, name, shape), parts in self._parts.items():
            if measured.name is site.name and name == candidate:
                seconds = max((m.first_call_s or 0.0 for m in parts.values()), default=0.0)
                slowest[shape.num_qo_tokens] = max(slowest.get(shape.num_qo_tokens, 0.0), seconds)
        return median(slowest.values()) if slowest else 0.0

    def relative_errors(self, site: Site, candidate: str) -> list[float]:
        """Half-width of the confidence interval over the median, for each whole timing of the fit points."""
        errors = []
        for shape in self.shapes(site, Role.FIT):
            for name in (PER_LAYER_TOTAL, PER_FORWARD_TOTAL):
                m = self.part(site, candidate, shape, name)
                if m and m.latency_us and m.latency_us > 0 and m.ci_low_us is not None and m.ci_high_us is not None:
                    errors.append((m.ci_high_us - m.ci_low_us) / 2 / m.latency_us)
        return errors


def group(site: Site, candidate: str, total: str) -> tuple[str, ...]:
    """Names of the stages that one whole timing covers."""
    per_layer = total == PER_LAYER_TOTAL
    return tuple(s.name for s in stages(site, candidate) if (s.amortization is Amortization.PER_LAYER) == per_layer)


def _latency_us(measurement: Measurement | None) -> float | None:
    if measurement is None or measurement.latency_us is None:
        return None
    return max(measurement.latency_us, _RESOLUTION_US)


def _end_us(measurement: Measurement, name: str) -> float:
    """One end of a timing's interval; its latency where it has none."""
    end = measurement.ci_low_us if name == "low" else measurement.ci_high_us
    return max(end if end is not None else measurement.latency_us or 0.0, _RESOLUTION_US)


def _order(m: Measurement) -> tuple[object, ...]:
    return (*m.key, m.role, m.outcome, m.detail, m.latency_us or 0.0)
