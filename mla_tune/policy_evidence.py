"""What a modelled policy says of itself: the GPU that it was scaled from, and how far its costs may be off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of these parts of a policy: immutable, and strict about unknown keys."""


class TrafficWeights(_Record, frozen=True):
    """The recorded traffic that weighed the shapes of a fit; see :mod:`mla_tune.learn.objective`."""

    traffic: str
    """SHA-256 of the file as :func:`mla_tune.traffic.dump_traffic` writes it, in hexadecimal."""
    forwards: int
    """Forwards in its cells."""
    uniform_share: float
    """Part of the weight that stayed evenly spread over all shapes."""


class WorkspaceCap(_Record, frozen=True):
    """Device memory that a choice of a table may need at most, in bytes; see :mod:`mla_tune.learn.cap`.

    Counted over the shapes that the table was trained on. Outside the measured ranges the incumbent stays, cap or not.
    """

    max_bytes: int
    shapes: int
    over: int
    """Shapes around which some candidate may exceed the cap, and is not chosen."""
    exempt: int
    """Those of them around which none is surely under it: there the incumbent stays all the same."""


class Uncertainty(_Record, frozen=True):
    """How far a modelled cost of one candidate may be off, both ways."""

    candidate: str
    relative: float
    """Half-width of the interval around a predicted whole path, as a logarithm: 0.1 is from 10 % less to 10 % more."""


class StageUncertainty(_Record, frozen=True):
    """The two parts of the uncertainty of one modelled stage, as logarithms."""

    site: str
    """Key of the site: :attr:`mla_tune.site.Site.key`."""
    candidate: str
    stage: str
    measured: float
    """Leave-one-out error of the curve on the GPU that was measured."""
    scaled: float
    """What may be wrong with the ratios that it was scaled by; see :mod:`mla_tune.learn.scaling`."""


class ScaledFrom(_Record, frozen=True):
    """The product that was measured."""

    sku: str
    sm_count: int


class Modelled(_Record, frozen=True):
    """How a policy was made for a GPU that nobody measured."""

    scaled_from: ScaledFrom
    limits: str
    """What was done with the limits that were found there."""
    stages: tuple[StageUncertainty, ...]


def header_lines(modelled: Modelled, stated: Iterable[Uncertainty]) -> Iterator[str]:
    """What the first lines of the file say; ``stated`` are the uncertainties of its tables."""
    yield "WARNING: modelled, not measured: no kernel was timed on this GPU, the thresholds are scaled from another"
    yield "GPU's measurements. Sweep this GPU and fit again before you rely on them."
    yield f"scaled from: {modelled.scaled_from.sku}, {modelled.scaled_from.sm_count} SMs"
    yield f"limits: {modelled.limits}"
    widths = [entry.relative for entry in stated]
    if widths:
        yield f"uncertainty of a predicted whole path: {min(widths):.2f} to {max(widths):.2f} (logarithm, both ways)"
