"""The policy file: its schema, and the only code that reads or writes it.

A policy is what one GPU model learned: for each site, model, head count and layer type a table of thresholds, with the
environment it was measured in and how well it did on points that the fit never saw. YAML, because people review it.
"""

from __future__ import annotations

import msgspec

SCHEMA_VERSION = 1


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of a policy: immutable, and strict about unknown keys."""


class Choice(_Record, frozen=True, omit_defaults=True):
    """From ``num_qo_tokens_from`` query tokens upward (until the next choice of the row) take ``candidate``."""

    num_qo_tokens_from: int
    candidate: str
    bracket: tuple[int, int] | None = None
    """The crossover lies inside these query token counts: below the first the previous candidate is faster beyond the
    noise band, above the second this one is. None on the first choice of a row."""


class Row(_Record, frozen=True):
    """The choices from ``kv_tokens_from`` context tokens upward (until the next row of the table)."""

    kv_tokens_from: int
    choices: tuple[Choice, ...]


class Limit(_Record, frozen=True):
    """A capability bound of this kernel build on this device, not a threshold: past it the candidate fails."""

    candidate: str
    num_qo_tokens: int
    """Largest count seen to run and to be correct."""
    fails_at: int
    """Smallest count seen to fail."""
    found_by: str
    """How: ``sweep`` (largest success and smallest failure among the swept points)."""
    reason: str
    """What the failure said."""


class Slowdown(_Record, frozen=True):
    """t(choice) / t(fastest measured candidate) of one rule over the held-out points of a table."""

    rule: str
    """``policy``, a baseline rule such as ``num_qo_tokens > 11673``, or ``always <candidate>``."""
    geomean: float
    mean: float
    p95: float
    worst: float


class HeldOut(_Record, frozen=True):
    """The judgement on points that the fit did not see."""

    points: int
    slowdown: tuple[Slowdown, ...]
    """The policy first, then every baseline that applies to the table."""


class Range(_Record, frozen=True):
    """Closed ranges that the measurements cover; outside them the incumbent is kept."""

    num_qo_tokens: tuple[int, int]
    kv_tokens: tuple[int, int]


class Table(_Record, frozen=True):
    """The dispatch table of one site, model, head count and layer type."""

    site: str
    model: str
    h_q: int | None
    """Query heads per rank as the kernel sees them; null where heads play no role."""
    layer: str
    """A layer type, or ``forward``: one choice for the whole mix of layers."""
    incumbent: str
    candidates: tuple[str, ...]
    """Every candidate that was measured, sorted; choices and limits name only these."""
    noise_band: float
    """Relative difference below which two candidates count as equal: the incumbent stays."""
    measured: Range
    limits: tuple[Limit, ...]
    rows: tuple[Row, ...]
    held_out: HeldOut


class Library(_Record, frozen=True):
    """One kernel library build; see :class:`mla_tune.sku.KernelLibrary`."""

    name: str
    version: str
    sha256: str


class PolicyEnvironment(_Record, frozen=True):
    """The machine and software that was measured; see :class:`mla_tune.sku.Environment`."""

    driver: str
    cuda: str
    torch: str
    triton: str
    shared_memory_optin_bytes: int
    libraries: tuple[Library, ...]


class Gpu(_Record, frozen=True):
    """The product that the policy is for."""

    sku: str
    sm_count: int


class Source(_Record, frozen=True):
    """The committed measurements behind the policy and the command that makes it from them again."""

    file: str
    sha256: str
    measurements: int
    command: str


class Policy(_Record, frozen=True):
    """One policy file."""

    schema: int
    gpu: Gpu
    evidence: str
    """``measured``, or ``modelled`` for a policy scaled from another GPU's measurements."""
    regime: str
    """The timing regime that the thresholds minimize: ``graph`` on a GPU, ``eager`` on the CPU."""
    environment: PolicyEnvironment
    source: Source
    tables: tuple[Table, ...]
