"""What was measured to justify a policy: a file of its own beside it, which no server reads.

``policies/nvidia-h200.yaml`` serves, ``policies/nvidia-h200.evidence.json`` says why: for each table the bracket of every
threshold, how every rule did on held-out points, and what a limit's failure said. It names the bytes of the policy that it
belongs to.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from mla_tune.errors import PolicyError
from mla_tune.policy.schema import Table, TableKey
from mla_tune.sites.engines import Engine

POLICY_RULE = "policy"
"""The rule name of the policy's own row in a held-out table."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the parts of an evidence file: immutable, and strict about unknown keys."""


class ThresholdEvidence(_Record, frozen=True):
    """What the costs around one threshold say, as factors on it: at 0.8 a shape has four fifths of its query tokens."""

    bracket: tuple[float, float]
    """Below the first every shape of the row has the previous candidate faster beyond the noise band, above the second this
    one."""
    win: tuple[float, float]
    """Mean relative win at the bracket's edges: of the previous candidate at the lower, of this one at the upper."""

    def at(self, num_qo_tokens: int) -> tuple[int, int]:
        """The bracket in query tokens where the threshold is at ``num_qo_tokens``."""
        low, high = self.bracket
        return int(num_qo_tokens * low // 1), int(-(-num_qo_tokens * high // 1))


class RowEvidence(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """The thresholds of one row of the table, in its order."""

    num_reqs_from: int
    kv_tokens_from: int
    censored: str | None = None
    """``above`` or ``below``: the costs cross, but outside the measured query tokens. Only of a row of one choice; without
    it there is no crossover."""
    thresholds: tuple[ThresholdEvidence, ...] = ()
    """Of every choice after the first."""


class LimitEvidence(_Record, frozen=True):
    """How a limit was found."""

    candidate: str
    num_qo_tokens: int
    """Largest count seen to run and to be correct."""
    fails_at: int
    """Smallest count seen to fail."""
    found_by: str
    """How: ``sweep`` (largest success and smallest failure among the swept points), or ``probe`` (two neighbours, each
    tried in a process of its own)."""
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


NOT_JUDGED = HeldOut(points=0, slowdown=())
"""Of a modelled table: nobody has points of a GPU that nobody had."""


class TrafficWeights(_Record, frozen=True):
    """The recorded traffic that weighed the shapes of a fit; see :mod:`mla_tune.fit.objective`."""

    traffic: str
    """SHA-256 of the file as :func:`mla_tune.sites.served_shapes.dump_traffic` writes it, in hexadecimal."""
    forwards: int
    """Forwards in its cells."""
    uniform_share: float
    """Part of the weight that stayed evenly spread over all shapes."""


class WorkspaceCap(_Record, frozen=True):
    """Device memory that a choice of a table may need at most, in bytes; see :mod:`mla_tune.fit.cap`.

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
    """Key of the site: :attr:`mla_tune.sites.site.Site.key`."""
    candidate: str
    stage: str
    measured: float
    """Leave-one-out error of the curve on the GPU that was measured."""
    scaled: float
    """What may be wrong with the ratios that it was scaled by; see :mod:`mla_tune.fit.scaling`."""


class Modelled(_Record, frozen=True):
    """How a policy was made for a GPU that nobody measured."""

    limits: str
    """What was done with the limits that were found on the measured one."""
    stages: tuple[StageUncertainty, ...]


class TableEvidence(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """Evidence of one table; the first fields are its key."""

    site: str
    model: str
    h_q: int | None
    layer: str
    engine: Engine = Engine.SGLANG
    noise_band: float
    """Relative difference below which two candidates count as equal: the incumbent stays. In a modelled table the
    uncertainty of both together."""
    rows: tuple[RowEvidence, ...]
    limits: tuple[LimitEvidence, ...] = ()
    held_out: HeldOut = NOT_JUDGED
    uncertainty: tuple[Uncertainty, ...] = ()
    """Of a modelled table, of each candidate; otherwise none."""
    workspace_cap: WorkspaceCap | None = None

    @property
    def key(self) -> TableKey:
        """The table that this is evidence of."""
        return (self.site, self.model, self.h_q, self.layer, self.engine)


class PolicyEvidence(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """What stands beside one policy."""

    first_call_bound_s: float
    """Longest first call on a new shape, in seconds, that the fit let a served candidate cost."""
    overall: HeldOut | None = None
    """Every rule over all tables of attention of one layer type together; None where no table has two candidates."""
    tables: tuple[TableEvidence, ...]
    modelled: Modelled | None = None
    objective: TrafficWeights | None = None

    def of(self, table: Table) -> TableEvidence | None:
        """The evidence of one table."""
        return next((entry for entry in self.tables if entry.key == table.key), None)


class _File(_Record, frozen=True):
    policy_sha256: str
    evidence: PolicyEvidence


def evidence_path(policy: str | os.PathLike[str]) -> Path:
    """Where the evidence of the policy file at ``policy`` stands."""
    path = Path(policy)
    return path.with_name(f"{path.name.removesuffix('.yaml')}.evidence.json")


def dump_evidence(evidence: PolicyEvidence, policy_sha256: str) -> bytes:
    """The bytes of the file beside a policy whose own bytes have that digest; equal evidence gives equal bytes."""
    file = _File(policy_sha256=policy_sha256, evidence=evidence)
    return msgspec.json.format(msgspec.json.encode(file), indent=1) + b"\n"


def parse_evidence(data: bytes, source: str, policy_sha256: str) -> PolicyEvidence:
    """The evidence in ``data``. Raises :class:`PolicyError` for anything else, and for another policy's evidence."""
    try:
        found = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PolicyError(f"{source}: must be the evidence of a policy: {error}; {_AGAIN}") from None
    if found.policy_sha256 != policy_sha256:
        raise PolicyError(
            f"{source}: must be the evidence of the policy beside it, of SHA-256 {policy_sha256[:16]}...: got that of "
            f"{found.policy_sha256[:16]}...; {_AGAIN}"
        )
    return found.evidence


_AGAIN = "write both files again with `mla-tune fit`"


def load_evidence(policy: str | os.PathLike[str], policy_sha256: str) -> PolicyEvidence | None:
    """What stands beside the policy file ``policy``, whose bytes have that digest; None where nothing does.

    Raises :class:`PolicyError` for a file that is not that policy's evidence.
    """
    path = evidence_path(policy)
    return parse_evidence(path.read_bytes(), str(path), policy_sha256) if path.is_file() else None
