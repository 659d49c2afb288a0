"""What a policy is: for each site, model, head count and layer type a table of thresholds that serves.

These are the values that the rest of the project works with. :mod:`mla_tune.policy.codec` reads and writes them as YAML,
:mod:`mla_tune.policy.rules` says what they must satisfy beyond their types, :mod:`mla_tune.policy.evidence` holds what
was measured to justify them and serves nothing.
"""

from __future__ import annotations

from itertools import pairwise

import msgspec

from mla_tune.policy.kernel_config import KernelConfig
from mla_tune.policy.threshold import Threshold
from mla_tune.sites.engines import Engine

ALWAYS = Threshold.level(0)
"""The threshold of a row's first choice, which every count reaches."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of a policy: immutable, and strict about unknown keys."""


class Choice(_Record, frozen=True, kw_only=True):
    """From its threshold in query tokens upward, until the next choice of the row, take ``candidate``."""

    threshold: Threshold = ALWAYS
    candidate: str


class Row(_Record, frozen=True, kw_only=True):
    """The choices from ``num_reqs_from`` requests and ``kv_tokens_from`` context tokens upward.

    Rows are sorted by both; the rows of one ``num_reqs_from`` serve up to the next one, and each of them up to the next
    ``kv_tokens_from`` among these.
    """

    num_reqs_from: int = 0
    kv_tokens_from: int = 0
    choices: tuple[Choice, ...]


class Limit(_Record, frozen=True):
    """A capability bound of this kernel build on this device, not a threshold: past it the candidate fails."""

    candidate: str
    num_qo_tokens: int
    """Largest count seen to run and to be correct."""


class Ineligible(_Record, frozen=True):
    """A candidate that does not serve, however fast it runs: each new shape costs a server too long a first call."""

    candidate: str
    first_call_s: float
    """Seconds of the slowest first call at a query token count, median over the counts that were measured."""


class Range(_Record, frozen=True):
    """Closed ranges that the measurements cover; outside them the incumbent is kept."""

    num_qo_tokens: tuple[int, int]
    kv_tokens: tuple[int, int]
    num_reqs: tuple[int, int]

    def holds(self, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> bool:
        """Whether a forward lies inside all three."""
        sizes = (self.num_qo_tokens, num_qo_tokens), (self.kv_tokens, kv_tokens), (self.num_reqs, num_reqs)
        return all(low <= size <= high for (low, high), size in sizes)


class CandidateBuilds(_Record, frozen=True):
    """Builds that one candidate depends on beyond those of its table."""

    candidate: str
    """Never the incumbent: without it there is nothing to switch from."""
    builds: tuple[str, ...]


class Table(_Record, frozen=True, kw_only=True):
    """The dispatch table of one site, model, head count and layer type."""

    site: str
    model: str
    h_q: int | None
    """Query heads per rank as the kernel sees them; None where heads play no role."""
    layer: str
    """A layer type, or ``forward``: one choice for the whole mix of layers."""
    engine: Engine = Engine.SGLANG
    """The engine that chooses."""
    incumbent: str
    candidates: tuple[str, ...]
    """Every candidate that was measured, sorted; choices and limits name only these."""
    builds: tuple[str, ...]
    """What the incumbent ran on, as ``sgl-flash-mla==1.0.0``, sorted: with any other build the table says nothing. Empty
    where every kernel is this project's own."""
    candidate_builds: tuple[CandidateBuilds, ...] = ()
    """What single candidates depend on besides; one whose builds are not there leaves the choice to the others."""
    measured: Range
    limits: tuple[Limit, ...] = ()
    """At most one of each candidate."""
    ineligible: tuple[Ineligible, ...] = ()
    """Measured candidates that no row may name; never the incumbent."""
    rows: tuple[Row, ...]

    @property
    def key(self) -> TableKey:
        """What no other table of the policy has."""
        return (self.site, self.model, self.h_q, self.layer, self.engine)


TableKey = tuple[str, str, int | None, str, Engine]
"""Site, model, query heads, layer and engine."""


def row_ends(table: Table) -> list[int]:
    """Context tokens at which each row ends: where the next of its group starts, or behind the measured range."""
    rows, last = table.rows, table.measured.kv_tokens[1] + 1
    ends = [b.kv_tokens_from if a.num_reqs_from == b.num_reqs_from else last for a, b in pairwise(rows)]
    return [*ends, last]


class Library(_Record, frozen=True):
    """One kernel library build; see :class:`mla_tune.hardware.sku.KernelLibrary`."""

    name: str
    version: str
    sha256: str


class PolicyEnvironment(_Record, frozen=True):
    """The machine and software that was measured; see :class:`mla_tune.hardware.sku.Environment`."""

    driver: str
    cuda: str
    torch: str
    triton: str
    shared_memory_optin_bytes: int
    libraries: tuple[Library, ...]


class Gpu(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """The product that the policy is for."""

    sku: str
    sm_count: int
    also: tuple[str, ...] = ()
    """Other products whose datasheet figures are the same, so that a modelled policy says the same of them."""

    @property
    def skus(self) -> tuple[str, ...]:
        """Every product that the policy serves."""
        return (self.sku, *self.also)


class Source(_Record, frozen=True):
    """The committed measurements behind the policy and the command that makes it from them again."""

    file: str
    sha256: str
    measurements: int
    command: str


class Policy(_Record, frozen=True, kw_only=True):
    """One policy: what a server loads."""

    gpu: Gpu
    evidence: str
    """``measured``, or ``modelled`` for a policy scaled from another GPU's measurements."""
    scaled_from: str | None = None
    """The product that was measured, of a modelled policy."""
    regime: str
    """The timing regime that the thresholds minimize: ``graph`` on a GPU, ``eager`` on the CPU."""
    environment: PolicyEnvironment
    source: Source
    overlap: int = 0
    """Percent of its selection that a query was assumed to share with the one before it, where there is a top-k."""
    provider: str | None = None
    """Key of the engine whose kernels ran around attention (:mod:`mla_tune.sites.provider`); None for our own."""
    kernel_config: tuple[KernelConfig, ...] = ()
    """Launch parameters of our own kernels that were tuned on this GPU; the others keep their defaults."""
    tables: tuple[Table, ...]
