"""The part of mla-tune that a serving engine imports: load a policy once, resolve a site once per model, then look up.

    dispatcher = Dispatcher.for_this_gpu(fallback="incumbent")
    site = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="forward")
    ...
    path = site.choose(num_qo_tokens, kv_tokens, num_reqs)  # in every forward: "sparse_fwd" or "with_kvcache"

``choose`` is a pure function of three host integers and of one table: it reads no environment, allocates nothing, takes
no lock, and answers the same on every rank that loaded the same bytes (compare :attr:`Dispatcher.digest`). Everything
that can go wrong goes wrong in ``load`` or ``resolve``: as one exception of :mod:`mla_tune.errors`, or, if the caller
passes ``fallback="incumbent"``, as the engine's own choice, logged once and listed in :attr:`Dispatcher.fallbacks`.

Loads the standard library, PyYAML and msgspec only.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mla_tune.errors import EnvironmentMismatchError, MlaTuneError, PolicyError, UsageError
from mla_tune.lookup import Choose, Explanation, Reason, compile_table, constant, decide
from mla_tune.policy import Policy, Table, digest, parse_policy, read_policy_file
from mla_tune.policy_kernels import launches_of
from mla_tune.site import FORWARD, LayerType, ModelConfig, SiteName
from mla_tune.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.gpu import GpuIdentity
    from mla_tune.launch import Launches

__all__ = ["Dispatcher", "Explanation", "Fallback", "Reason", "Resolved"]

Fallback = Literal["incumbent"] | None
"""What a miss at load or resolve means: an exception (None), or the engine's own choice (``"incumbent"``)."""

POLICY_VARIABLE = "MLA_TUNE_POLICY"
"""Read by :meth:`Dispatcher.for_this_gpu`: the path of a policy file, or ``off`` for the incumbent everywhere."""

_log = logging.getLogger("mla_tune")


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """One site of one model, ready to serve."""

    site: SiteName
    model: str
    layer: str
    h_q: int | None
    """Query heads per rank of the table; None where heads play no role."""
    incumbent: str
    choose: Choose
    """``choose(num_qo_tokens, kv_tokens, num_reqs)`` -> candidate name, for any integers; a slot, so that a call costs no
    method lookup."""
    table: Table | None
    """The policy's table; None after a fallback."""
    fallback: str | None
    """Why the incumbent is always answered; None where the table is."""

    def explain(self, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> Explanation:
        """What :attr:`choose` answers there, and which rule and thresholds led to it. Not for the hot path."""
        if self.table is None:
            return Explanation(self.incumbent, Reason.FALLBACK)
        return decide(self.table, num_qo_tokens, kv_tokens, num_reqs)


class Dispatcher:
    """A loaded policy, or the reason why there is none. Immutable but for the list of fallbacks; thread-safe."""

    def __init__(self, policy: Policy | None, *, source: str, digest: str = "", fallback: Fallback = None) -> None:
        """``policy`` from ``source``; None makes a dispatcher that answers the incumbent everywhere."""
        _check_fallback(fallback)
        self.policy = policy
        self.source = source
        """The policy's file, or why there is none."""
        self.digest = digest
        """SHA-256 of the policy file, which ranks compare at start; empty without one."""
        self._fallback = fallback
        self._fallbacks: list[str] = []
        self._lock = threading.Lock()
        tables = () if policy is None else policy.tables
        self._tables = {(table.site, table.model, table.h_q, table.layer): table for table in tables}
        if policy is None:
            self._note(source)
        elif policy.evidence == "modelled":
            _log.warning("%s is modelled: none of its thresholds was measured on %s", source, policy.gpu.sku)
        else:
            _log.info("%s is %s on %s", source, policy.evidence, policy.gpu.sku)

    @property
    def evidence(self) -> str:
        """``measured`` or ``modelled`` as the policy says of itself; ``none`` without one."""
        return "none" if self.policy is None else self.policy.evidence

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """One line for each reason why an incumbent is answered instead of the policy, in the order of the misses."""
        return tuple(self._fallbacks)

    @property
    def launches(self) -> Launches:
        """Launch parameters for whoever runs this project's kernels: the policy's, and their defaults otherwise.

        For example ``dequantize_k_cache_paged(..., config=dispatcher.launches.dequantize("v4", rows))``.
        """
        return launches_of(() if self.policy is None else self.policy.kernel_config)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, fallback: Fallback = None) -> Dispatcher:
        """The policy at ``path``, whatever GPU it is for. ``fallback`` also becomes the default of :meth:`resolve`.

        Raises :class:`PolicyError` for a file that is missing or malformed, unless ``fallback`` is given.
        """
        _check_fallback(fallback)
        try:
            return cls._from_bytes(read_policy_file(path), os.fspath(path), fallback)
        except PolicyError as error:
            return cls._after(error, fallback)

    @classmethod
    def for_this_gpu(cls, *, fallback: Fallback = None) -> Dispatcher:
        """The shipped policy of the GPU that this process sees; ``MLA_TUNE_POLICY`` overrides it.

        The SKU, its SM count and the version of every installed kernel library must be those that were measured:
        limits belong to a build. For a file that the user named in ``MLA_TUNE_POLICY`` they are only warned about.
        Raises :class:`EnvironmentMismatchError` or :class:`PolicyError`, unless ``fallback`` is given.
        """
        _check_fallback(fallback)
        named = os.environ.get(POLICY_VARIABLE, "").strip()
        if named == "off":
            return cls(None, source=f"{POLICY_VARIABLE}=off", fallback="incumbent")
        from mla_tune.gpu import detect_gpu

        gpu = detect_gpu()
        if named:
            dispatcher = cls.load(named, fallback=fallback)
            for mismatch in _mismatches(dispatcher.policy, gpu):
                _log.warning("%s is used because %s names it, but %s", named, POLICY_VARIABLE, mismatch)
            return dispatcher
        try:
            return cls._shipped(gpu, fallback)
        except (PolicyError, EnvironmentMismatchError) as error:
            return cls._after(error, fallback)

    def resolve(
        self, site: str, *, model: str, layer: str, h_q: int | None = None, fallback: Fallback = None
    ) -> Resolved:
        """Prepare one choice; done once when a model is loaded.

        ``layer`` is a layer type or ``forward`` (one choice for the model's whole mix of layers); ``h_q`` is the padded
        head count per rank, None for the model's own. An unknown site, model or layer word is the caller's mistake and
        always raises :class:`UsageError`. A layer, head count or table that is not there, or a table that leaves no
        candidate at some token count, raises it or :class:`PolicyError`, unless ``fallback`` is given here or at load.
        """
        _check_fallback(fallback)
        name = _site_name(site)
        config = find_model(model)
        if layer not in (*LayerType, FORWARD):
            accepted = ", ".join((*LayerType, FORWARD))
            raise UsageError(f"layer must be a layer type or {FORWARD!r}: got {layer!r}; accepted: {accepted}")
        reason = self.source
        if self.policy is not None:
            try:
                table = self._table(name, config, layer, h_q)
                choose = compile_table(table)
                return Resolved(name, model, str(layer), table.h_q, table.incumbent, choose, table, None)
            except (PolicyError, UsageError) as error:
                if fallback is None and self._fallback is None:
                    raise
                reason = str(error)
                self._note(reason)
        incumbent = config.incumbent(name)
        return Resolved(name, model, str(layer), h_q, incumbent, constant(incumbent), None, reason)

    def _table(self, site: SiteName, config: ModelConfig, layer: str, h_q: int | None) -> Table:
        if layer != FORWARD:
            h_q = config.site(site, LayerType(layer), h_q).h_q
        else:
            h_q = config.check_heads(h_q) if site is SiteName.PREFILL_ATTENTION else None
        try:
            return self._tables[site, config.name, h_q, layer]
        except KeyError:
            ours = [key for key in self._tables if key[:2] == (site, config.name)]
            accepted = ", ".join(f"{layer} with h_q {heads}" for _, _, heads, layer in ours) or "no layer"
            raise PolicyError(
                f"{self.source} must have a table for {site} of {config.name}: got layer {layer} with h_q {h_q}; "
                f"accepted: {accepted}; sweep that site and fit again, or pass fallback='incumbent'"
            ) from None

    def _note(self, reason: str) -> None:
        """Log and list a reason, the first time only."""
        with self._lock:
            if reason in self._fallbacks:
                return
            self._fallbacks.append(reason)
        _log.warning("the engine's own choice is kept: %s", reason)

    @classmethod
    def _from_bytes(cls, data: bytes, source: str, fallback: Fallback) -> Dispatcher:
        return cls(parse_policy(data, source), source=source, digest=digest(data), fallback=fallback)

    @classmethod
    def _after(cls, error: MlaTuneError, fallback: Fallback) -> Dispatcher:
        """The dispatcher without a policy that ``fallback`` asks for, or ``error``."""
        if fallback is None:
            raise error from None
        return cls(None, source=str(error), fallback=fallback)

    @classmethod
    def _shipped(cls, gpu: GpuIdentity | None, fallback: Fallback) -> Dispatcher:
        if gpu is None:
            raise EnvironmentMismatchError(
                "for_this_gpu needs a visible NVIDIA GPU and its driver: got none; "
                f"check CUDA_VISIBLE_DEVICES, or set {POLICY_VARIABLE} to a policy file"
            )
        from mla_tune.packaged import packaged_policy

        file = packaged_policy(gpu.sku)
        dispatcher = cls._from_bytes(file.read_bytes(), str(file), fallback)
        mismatch = next(iter(_mismatches(dispatcher.policy, gpu)), None)
        if mismatch is not None:
            step = f"sweep and fit on this machine, or set {POLICY_VARIABLE}={file} to use the file as it is"
            raise EnvironmentMismatchError(f"{mismatch}; {step}")
        return dispatcher


_SAME_MODULE = {
    "sgl-flash-mla": "flash-mla",
    "flash-mla": "sgl-flash-mla",
    "sgl-deep-gemm": "deep-gemm",
    "deep-gemm": "sgl-deep-gemm",
}
"""Distributions that bring the same module: a fork and its upstream are different builds."""


def _installed(distribution: str) -> str | None:
    """Name and version of a distribution, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{distribution} {version(distribution)}" if distribution else None
    except PackageNotFoundError:
        return None


def _mismatches(policy: Policy | None, gpu: GpuIdentity | None) -> list[str]:
    """How this machine differs from the measured one in what thresholds and limits depend on; one line each."""
    if policy is None:
        return []
    from importlib.metadata import PackageNotFoundError, version

    measured = (policy.gpu.sku, policy.gpu.sm_count)
    found = [] if gpu is None else [(gpu.sku, gpu.sm_count)]
    lines = []
    if found != [measured]:
        here = "no visible GPU" if gpu is None else f"{gpu.sku} with {gpu.sm_count} SMs"
        lines.append(f"the GPU must be the measured {measured[0]} with {measured[1]} SMs: got {here}")
    for library in policy.environment.libraries:
        try:
            installed = version(library.name)
        except PackageNotFoundError:
            other = _installed(_SAME_MODULE.get(library.name, ""))
            if other:  # without any metadata there is nothing to compare
                lines.append(f"{library.name} {library.version} must be the measured build: got {other} in its place")
            continue
        if installed != library.version:
            lines.append(f"{library.name} must be the measured version {library.version}: got {installed}")
    return lines


def _site_name(site: str) -> SiteName:
    try:
        return SiteName(site)
    except ValueError:
        raise UsageError(f"site must be a known one: got {site!r}; accepted: {', '.join(SiteName)}") from None


def _check_fallback(fallback: object) -> None:
    if fallback not in (None, "incumbent"):
        raise UsageError(f"fallback must be a known word: got {fallback!r}; accepted: None, 'incumbent'")
