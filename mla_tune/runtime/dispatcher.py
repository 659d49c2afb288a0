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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mla_tune.errors import EnvironmentMismatchError, MlaTuneError, PolicyError, UsageError
from mla_tune.policy.codec import digest, parse_policy, read_policy_file
from mla_tune.policy.decision import Choose, Decision, ExplainedChoice, Reason, constant
from mla_tune.policy.kernel_config import launches_of
from mla_tune.policy.schema import Policy, Table, TableKey
from mla_tune.runtime.pins import pin_table, pinned_reason
from mla_tune.runtime.serving import ENGINES, GpuKey, Serving, find_serving
from mla_tune.runtime.switches import POLICY_VARIABLE, Rule, Switches
from mla_tune.sites.engines import Engine, model_incumbent, table_engine
from mla_tune.sites.provider import OWN
from mla_tune.sites.site import FORWARD, LayerType, ModelConfig, SiteName
from mla_tune.sites.site import model as find_model

if TYPE_CHECKING:
    from mla_tune.sites.launch_parameters import Launches

__all__ = ["Dispatcher", "ExplainedChoice", "Fallback", "Reason", "Resolved", "Rule"]

Fallback = Literal["incumbent"] | None
"""What a miss at load or resolve means: an exception (None), or the engine's own choice (``"incumbent"``)."""

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
    decision: Decision | None
    """The policy's table, under a pin the pin's, ready to answer; None after a fallback."""
    fallback: str | None
    """Why the incumbent is always answered; None where the table is."""
    rule: Rule = Rule.POLICY
    """Who decides here; see :mod:`mla_tune.runtime.switches`."""

    @property
    def table(self) -> Table | None:
        """The table of :attr:`decision`."""
        return None if self.decision is None else self.decision.table

    def explain(self, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> ExplainedChoice:
        """What :attr:`choose` answers there, and which rule and thresholds led to it. Not for the hot path."""
        if self.decision is None:
            return ExplainedChoice(self.incumbent, Reason.FALLBACK)
        found = self.decision.explain(num_qo_tokens, kv_tokens, num_reqs)
        return pinned_reason(found) if self.rule is Rule.PIN else found


class Dispatcher:
    """A loaded policy, or the reason why there is none. Immutable but for the list of fallbacks; thread-safe."""

    def __init__(
        self,
        policy: Policy | None,
        *,
        source: str,
        digest: str = "",
        fallback: Fallback = None,
        switches: Switches | None = None,
        serving: Serving | None = None,
    ) -> None:
        """``policy`` from ``source``; None makes a dispatcher that answers the incumbent everywhere.

        ``serving`` says which of its tables serve, and why not the others; all of them do without it.
        """
        _check_fallback(fallback)
        self.policy = policy
        self.switches = Switches() if switches is None else switches
        """What the operator set; only :meth:`for_this_gpu` reads it from the environment."""
        self.source = source
        """The policy's file, or why there is none."""
        self.digest = digest
        """SHA-256 of the policy file, which ranks compare at start; empty without one."""
        self.serving = serving
        """What :meth:`for_this_gpu` found; None for a policy that was loaded as it is."""
        self.differences = () if serving is None else serving.overridden
        """How this machine differs from the measured one, where :meth:`for_this_gpu` serves a named file all the same."""
        self._fallback = fallback
        self._fallbacks: list[str] = []
        self._lock = threading.Lock()
        tables = () if policy is None else policy.tables if serving is None else serving.tables
        self._left_out: dict[TableKey, str] = {}
        """Why tables of the policy do not serve."""
        self._tables = {table.key: table for table in tables}
        if policy is None:
            self._note(source)
            return
        self._left_out |= {
            table.key: group.reason
            for group in (() if serving is None else serving.left_out)
            if group.candidate is None
            for table in group.tables
        }
        if policy.evidence == "modelled":
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

    @property
    def decides_by(self) -> str:
        """Everything that decides, in one line: two processes with the same line answer alike; ranks compare it."""
        line = f"policy {self.digest or 'none'}, mode {self.switches.mode}"
        if self.serving is None or not self.serving.left_out:
            return line
        return f"{line}, without {'; '.join(map(str, self.serving.left_out))}"

    @property
    def summary(self) -> str:
        """One line for a log: which file decides, how many tables serve of how many, and why not the others."""
        return self.source if self.serving is None else self.serving.summary

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, fallback: Fallback = None, switches: Switches | None = None
    ) -> Dispatcher:
        """The policy at ``path``, whatever GPU it is for. ``fallback`` also becomes the default of :meth:`resolve`.

        Raises :class:`PolicyError` for a file that is missing or malformed, unless ``fallback`` is given.
        """
        _check_fallback(fallback)
        try:
            data = read_policy_file(path)
            return cls._from_bytes(data, os.fspath(path), fallback, switches)
        except PolicyError as error:
            return cls._after(error, fallback, switches)

    @classmethod
    def for_this_gpu(cls, *, fallback: Fallback = None, provider: str = OWN) -> Dispatcher:
        """The shipped policy of the GPU that this process sees, as the ``MLA_TUNE_*`` variables have it.

        ``provider`` is whose kernels run around attention in this process, and who asks: ``own``, ``sglang`` or ``vllm``.

        They are parsed here, once; :mod:`mla_tune.runtime.switches` lists them with their order, and
        :mod:`mla_tune.policy.search` the order of files. SKU, SM count and the builds that a table names must be those that
        were measured; a table whose builds are not here is left out, alone. A file that the user named in
        ``MLA_TUNE_POLICY`` serves all the same. One line says what serves. Raises :class:`UsageError`,
        :class:`PolicyError`, or, where no table serves, :class:`EnvironmentMismatchError`, unless ``fallback`` is given.
        """
        _check_fallback(fallback)
        if provider not in ENGINES:
            raise UsageError(f"provider must be a known word: got {provider!r}; accepted: {', '.join(ENGINES)}")
        try:
            switches = Switches.from_environment(os.environ)
        except UsageError as error:
            return cls._after(error, fallback, None)
        if switches.off is not None:
            return cls(None, source=switches.off, fallback="incumbent", switches=switches)
        try:
            return cls._for_gpu(fallback, switches, provider)
        except (PolicyError, EnvironmentMismatchError) as error:
            return cls._after(error, fallback, switches)

    def resolve(
        self,
        site: str,
        *,
        model: str,
        layer: str,
        h_q: int | None = None,
        fallback: Fallback = None,
        engine: Engine = Engine.SGLANG,
        engine_setting: str | None = None,
    ) -> Resolved:
        """Prepare one choice; done once when a model is loaded.

        ``layer`` is a layer type or ``forward`` (one choice for the model's whole mix of layers); ``h_q`` is the padded
        head count per rank, None for the model's own; ``engine`` is who chooses, for where engines differ in what they
        can take; ``engine_setting`` is what the user told the engine itself about this choice, which wins. An unknown
        site, model or layer word is the caller's mistake and always raises :class:`UsageError`. A layer, head count or
        table that is not there, or a table that leaves no candidate at some token count, raises it or
        :class:`PolicyError`, unless ``fallback`` is given here or at load.
        """
        _check_fallback(fallback)
        name = _site_name(site)
        config = find_model(model)
        if layer not in (*LayerType, FORWARD):
            accepted = ", ".join((*LayerType, FORWARD))
            raise UsageError(f"layer must be a layer type or {FORWARD!r}: got {layer!r}; accepted: {accepted}")
        incumbent = model_incumbent(engine, name, config)
        rule, reason = Rule.INCUMBENT, self.source
        if engine_setting is not None:
            rule, reason = Rule.ENGINE, f"{engine_setting} is the user's own setting for {name}, and wins"
            self._note(reason)
        elif self.switches.off is not None:
            rule = Rule.OFF
        elif self.policy is not None:
            try:
                return self._serving(
                    self._table(name, config, layer, h_q, table_engine(engine, name, config)), str(layer)
                )
            except (PolicyError, UsageError) as error:
                if fallback is None and self._fallback is None:
                    raise
                reason = str(error)
                self._note(reason)
        return Resolved(name, config.name, str(layer), h_q, incumbent, constant(incumbent), None, reason, rule)

    def _serving(self, table: Table, layer: str) -> Resolved:
        name, rule, incumbent = SiteName(table.site), Rule.POLICY, table.incumbent
        candidate = self.switches.pin(name)
        if candidate is not None:
            modelled = self.policy is not None and self.policy.evidence == "modelled"
            table, rule = pin_table(table, candidate, modelled=modelled), Rule.PIN
        decision = Decision(table)
        return Resolved(name, table.model, layer, table.h_q, incumbent, decision.choose, decision, None, rule)

    def _table(self, site: SiteName, config: ModelConfig, layer: str, h_q: int | None, engine: Engine) -> Table:
        if layer != FORWARD:
            h_q = config.site(site, LayerType(layer), h_q).h_q
        else:
            h_q = config.check_heads(h_q) if site is SiteName.PREFILL_ATTENTION else None
        try:
            return self._tables[site, config.name, h_q, layer, engine]
        except KeyError:
            left = self._left_out.get((site, config.name, h_q, layer, engine))
            if left is not None:
                raise PolicyError(
                    f"{self.source} does not serve {site} of {config.name}, layer {layer}: {left}"
                ) from None
            ours = [key[2:4] for key in self._tables if key[:2] == (site, config.name) and key[4] == engine]
            accepted = ", ".join(f"{layer} with h_q {heads}" for heads, layer in ours) or "no layer"
            of = "" if engine is Engine.SGLANG else f" in {engine}"
            raise PolicyError(
                f"{self.source} must have a table for {site} of {config.name}{of}: got layer {layer} with h_q {h_q}; "
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
    def _from_bytes(cls, data: bytes, source: str, fallback: Fallback, switches: Switches | None) -> Dispatcher:
        policy = parse_policy(data, source)
        return cls(policy, source=source, digest=digest(data), fallback=fallback, switches=switches)

    @classmethod
    def _after(cls, error: MlaTuneError, fallback: Fallback, switches: Switches | None) -> Dispatcher:
        """The dispatcher without a policy that ``fallback`` asks for, or ``error``."""
        if fallback is None:
            raise error from None
        return cls(None, source=str(error), fallback=fallback, switches=switches)

    @classmethod
    def _for_gpu(cls, fallback: Fallback, switches: Switches, provider: str) -> Dispatcher:
        """What :func:`find_serving` finds, said in one line."""
        from mla_tune.hardware.nvml import detect_gpu

        unknown: tuple[str, ...] = ()
        try:
            gpu = detect_gpu()
        except EnvironmentMismatchError as error:  # nobody can tell which GPU this is
            if switches.policy is None:
                raise
            gpu, unknown = None, (str(error),)
        if gpu is None and switches.policy is None:
            raise EnvironmentMismatchError(
                "for_this_gpu needs a visible NVIDIA GPU and its driver: got none; "
                f"check CUDA_VISIBLE_DEVICES, or set {POLICY_VARIABLE} to a policy file"
            )
        serving = find_serving(None if gpu is None else GpuKey(gpu.sku, gpu.sm_count), provider, switches)
        if not serving.tables:
            named = f", or set {POLICY_VARIABLE} to a file to use it as it is"
            raise EnvironmentMismatchError(f"{serving.summary}; run `mla-tune sweep` and `mla-tune fit` here{named}")
        serving = replace(serving, overridden=(*unknown, *serving.overridden))
        found = cls(
            serving.policy,
            source=str(serving.file),
            digest=serving.digest,
            fallback=fallback,
            switches=switches,
            serving=serving,
        )
        # What does not serve is worth a warning where nobody would see the line otherwise.
        quiet = serving.overridden or not (serving.complete or _log.isEnabledFor(logging.INFO))
        _log.log(logging.WARNING if quiet else logging.INFO, "%s", serving.summary)
        return found


def _site_name(site: str) -> SiteName:
    try:
        return SiteName(site)
    except ValueError:
        raise UsageError(f"site must be a known one: got {site!r}; accepted: {', '.join(SiteName)}") from None


def _check_fallback(fallback: object) -> None:
    if fallback not in (None, "incumbent"):
        raise UsageError(f"fallback must be a known word: got {fallback!r}; accepted: None, 'incumbent'")
