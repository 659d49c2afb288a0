"""The policy file: its schema, and the only code that reads or writes it.

A policy is what one GPU model learned: for each site, model, head count and layer type a table of thresholds, with the
environment it was measured in and how well it did on points that the fit never saw. YAML, because people review it.

Reading is strict, so that a file either means one thing or is refused: :mod:`mla_tune.policy.codec` says which YAML is
accepted, :mod:`mla_tune.policy.rules` what a policy must satisfy beyond its types. Writing is byte-stable.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import msgspec

from mla_tune import __version__
from mla_tune.errors import PolicyError
from mla_tune.policy.evidence import Modelled, TrafficWeights, Uncertainty, WorkspaceCap, header
from mla_tune.policy.kernel_config import KernelConfig
from mla_tune.policy.rules import problems
from mla_tune.policy.text import REBUILD, read_written, shown, write_yaml
from mla_tune.sites.engines import Engine

SCHEMA_VERSION = 3
MAX_POLICY_BYTES = 1 << 20
"""Largest file that is read. All sites and models of one GPU take about 100 KB."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of a policy: immutable, and strict about unknown keys."""


class Choice(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """From its threshold in query tokens upward (until the next choice of the row) take ``candidate``.

    The threshold rises linearly in context tokens from ``num_qo_tokens_from`` at the row's start to ``num_qo_tokens_to``
    at its end (see :class:`mla_tune.policy.threshold.Threshold` for the exact integers): what ``sparse_fwd`` dequantizes
    grows with the context, and the crossover with it.
    """

    num_qo_tokens_from: int
    num_qo_tokens_to: int | None = None
    """Above ``num_qo_tokens_from``; None for a threshold that is the same all along the row."""
    candidate: str
    bracket: tuple[float, float] | None = None
    """Factors on the threshold: below the first every shape of the row has the previous candidate faster beyond the noise
    band, above the second this one. None on the first choice of a row, like the next two."""
    interval: tuple[float, float] | None = None
    """Factors on the threshold: a 95 % bootstrap confidence interval of where the mean costs cross."""
    win: tuple[float, float] | None = None
    """Mean relative win at the bracket's edges: of the previous candidate at the lower, of this one at the upper."""


class Row(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """The choices from ``num_reqs_from`` requests and ``kv_tokens_from`` context tokens upward.

    Rows are sorted by both; the rows of one ``num_reqs_from`` serve up to the next one, and each of them up to the next
    ``kv_tokens_from`` among these.
    """

    num_reqs_from: int
    kv_tokens_from: int
    censored: str | None = None
    """``above`` or ``below``: the curves cross, but outside the measured query tokens. Only in a row of one choice; without
    it such a row says that there is no crossover."""
    choices: tuple[Choice, ...]


class Limit(_Record, frozen=True):
    """A capability bound of this kernel build on this device, not a threshold: past it the candidate fails."""

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


class Ineligible(_Record, frozen=True):
    """A candidate that does not serve, however fast it runs: each new shape costs a server too long a first call."""

    candidate: str
    first_call_s: float
    """Seconds of the slowest first call at a query token count, median over the counts that were measured."""
    bound_s: float
    """What the fit allowed."""


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
    num_reqs: tuple[int, int]


class CandidateBuilds(_Record, frozen=True):
    """Builds that one candidate depends on beyond those of its table."""

    candidate: str
    """Never the incumbent: without it there is nothing to switch from."""
    builds: tuple[str, ...]


class Table(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """The dispatch table of one site, model, head count and layer type."""

    site: str
    model: str
    h_q: int | None
    """Query heads per rank as the kernel sees them; null where heads play no role."""
    layer: str
    """A layer type, or ``forward``: one choice for the whole mix of layers."""
    engine: Engine = Engine.SGLANG
    """The engine that chooses; written only where it is another than SGLang."""
    incumbent: str
    candidates: tuple[str, ...]
    """Every candidate that was measured, sorted; choices and limits name only these."""
    builds: tuple[str, ...]
    """What the incumbent ran on, as ``sgl-flash-mla==1.0.0``, sorted: with any other build the table says nothing. Empty
    where every kernel is this project's own."""
    candidate_builds: tuple[CandidateBuilds, ...] = ()
    """What single candidates depend on besides; one whose builds are not there leaves the choice to the others."""
    noise_band: float
    """Relative difference below which two candidates count as equal: the incumbent stays. In a modelled table the
    uncertainty of both together."""
    measured: Range
    limits: tuple[Limit, ...]
    ineligible: tuple[Ineligible, ...]
    """Measured candidates that no row may name; never the incumbent."""
    rows: tuple[Row, ...]
    held_out: HeldOut
    uncertainty: tuple[Uncertainty, ...] = ()
    """Of a modelled table, of each candidate; otherwise none."""
    workspace_cap: WorkspaceCap | None = None


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


class Policy(_Record, frozen=True, kw_only=True, omit_defaults=True):
    """One policy file."""

    schema: int
    gpu: Gpu
    evidence: str
    """``measured``, or ``modelled`` for a policy scaled from another GPU's measurements."""
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
    modelled: Modelled | None = None
    """Of a modelled policy, which it must state; otherwise None."""
    objective: TrafficWeights | None = None


_ONE_LINE = frozenset({"gpu", "scaled_from", "measured", "choices", "workspace_cap", "objective"})
_ONE_LINE_ITEMS = frozenset(
    {"libraries", "limits", "ineligible", "slowdown", "uncertainty", "stages", "kernel_config", "candidate_builds"}
)


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read the policy file at ``path``. Raises :class:`PolicyError`."""
    return parse_policy(read_policy_file(path), os.fspath(path))


def read_policy_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a policy file, at most one byte more than is accepted. Raises :class:`PolicyError`."""
    try:
        with open(path, "rb") as file:
            return file.read(MAX_POLICY_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise PolicyError(f"a policy file must be readable: got {os.fspath(path)}: {reason}; check the path") from None


def parse_policy(data: bytes, source: str) -> Policy:
    """The policy in ``data``, checked; ``source`` names the file in errors. Raises :class:`PolicyError`."""
    text = _decode(data, source)
    policy = _as_written(text) or _as_yaml(text, source)
    problem = next(problems(policy), None)
    if problem is not None:
        raise _error(text, source, problem.path, problem.text)
    return policy


def dump_policy(policy: Policy) -> bytes:
    """``policy`` as the bytes of its file: equal policies give equal bytes, and :func:`parse_policy` gives it back.

    Raises :class:`PolicyError` for a policy that would not be read back.
    """
    body = write_yaml(msgspec.to_builtins(policy), one_line=_ONE_LINE, one_line_items=_ONE_LINE_ITEMS)
    data = "".join(f"# {line}\n" for line in header(policy)).encode() + body.encode()
    parse_policy(data, "policy to write")
    return data


def write_policy(path: str | os.PathLike[str], policy: Policy) -> None:
    """Write ``policy`` to ``path``, all of it or nothing. Raises :class:`PolicyError`."""
    from mla_tune.files import write_atomically  # a server reads policies and never writes one

    data = dump_policy(policy)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise PolicyError(f"a policy file must be writable: got {path}: {error.strerror}; check the path") from None


def digest(data: bytes) -> str:
    """SHA-256 of a policy file in hexadecimal: ranks compare it at start and refuse to differ."""
    return hashlib.sha256(data).hexdigest()


def _decode(data: bytes, source: str) -> str:
    if len(data) > MAX_POLICY_BYTES:
        raise PolicyError(f"{source}: must be at most {MAX_POLICY_BYTES} bytes: got more; {REBUILD}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise PolicyError(f"{source}:{line}: must be UTF-8: got byte 0x{byte:02x}; {REBUILD}") from None


def _as_written(text: str) -> Policy | None:
    """The policy in a text that this version wrote; None for any other, valid or not."""
    raw = read_written(text)
    if raw is None or raw.get("schema") != SCHEMA_VERSION:
        return None
    try:
        return msgspec.convert(raw, Policy, strict=True)
    except msgspec.ValidationError:
        return None


def _as_yaml(text: str, source: str) -> Policy:
    """The policy in any text, or what is wrong with it."""
    from mla_tune.policy.codec import read_yaml, value_at

    raw = read_yaml(text, source)
    _check_schema(raw, source)
    try:
        return msgspec.convert(raw, Policy, strict=True)
    except msgspec.ValidationError as error:
        rule, _, place = str(error).partition(" - at `$")
        path = place.strip("`.")
        got = "" if rule.startswith("Object") else f" ({shown(value_at(raw, path))})"
        raise _error(text, source, path, f"does not fit schema {SCHEMA_VERSION}: {rule}{got}") from None


def _check_schema(raw: Any, source: str) -> None:
    """The version first: a newer file should ask for an upgrade, not complain about a key that we don't know."""
    if not isinstance(raw, dict):
        raise PolicyError(f"{source}: must be a mapping with the keys of a policy: got {shown(raw)}; {REBUILD}")
    schema = raw.get("schema")
    if schema == SCHEMA_VERSION:
        return
    newer = isinstance(schema, int) and schema > SCHEMA_VERSION
    step = "upgrade mla-tune" if newer else REBUILD
    reads = f"mla-tune {__version__} reads schema {SCHEMA_VERSION}"
    raise PolicyError(f"{source}: schema must be one that is read here: got {shown(schema)}; {reads}; {step}")


def _error(text: str, source: str, path: str, rule: str) -> PolicyError:
    from mla_tune.policy.codec import line_of

    line = line_of(text, path)
    return PolicyError(f"{source}:{line}: {path or 'the file'} {rule}; {REBUILD}")
