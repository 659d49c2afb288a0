"""What the hooks of one engine process share, whichever the engine: the service, the agreement of ranks, its one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mla_tune import __version__
from mla_tune.integrations.seams import Hooks
from mla_tune.runtime.counters import SiteCounters
from mla_tune.runtime.decider import Decider, Service
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.runtime.ranks import agree, gather
from mla_tune.sites.candidates import PAGED
from mla_tune.sites.site import MODELS, LayerType, ModelConfig

UNBOUNDED = 1 << 62
"""More tokens than any batch has."""
_log = logging.getLogger("mla_tune")


class Prepared(msgspec.Struct, frozen=True):
    """What a backend's hook has found out about its choice when the backend is built."""

    deciders: tuple[Decider, ...] = ()
    """Who decides; none where the engine keeps its own choice throughout."""
    kept: tuple[str, ...] = ()
    """Why some or all of it stays with the engine."""
    most_tokens: int = UNBOUNDED
    """Tokens up to which this rank has the memory for what the engine would not take by itself; see the hook, whose."""

    @property
    def choice(self) -> tuple[tuple[str | int | None, ...], ...]:
        """What ranks that share a forward must have alike."""
        resolved = (decider.resolved for decider in self.deciders)
        return tuple((one.site, one.model, one.layer, one.h_q, one.rule) for one in resolved)


@dataclass(slots=True)
class EngineProcess:
    """One per process: engines build several backends (target, draft, one for each group of layers) from one policy."""

    hooks: Hooks
    group: Callable[[], Any]
    """The CPU process group of the ranks that share forwards; None where the engine has made none."""
    load: Callable[[], Dispatcher]
    """The policy of this GPU for this engine; never raises for what is wrong with a policy."""
    service: Service | None = None
    fabricating: bool = False
    """Whether the engine runs a forward of its own making, such as a warm-up, which is neither counted nor recorded."""
    announced: set[str] = field(default_factory=set)

    def serve(self, engine: str) -> Service:
        """The service; the first call loads the policy and compares it between the ranks of :attr:`group`.

        ``engine``: the user's settings for the engine that decide beside the policy, which ranks compare too. Raises
        :class:`mla_tune.errors.EnvironmentMismatchError` where they differ and are told to refuse.
        """
        if self.service is None:
            try:
                dispatcher = self.load()
            # A policy that this rank alone cannot load is a difference between ranks, which they compare next.
            except Exception as error:
                _log.exception("mla-tune could not load a policy; the engine keeps its own choice")
                dispatcher = Dispatcher(None, source=f"loading failed: {error}", fallback="incumbent")
            self.service = Service(agree(dispatcher, group=self.group(), engine=engine))
        return self.service

    def prepare(self, what: str, settings: str, resolve: Callable[[Service], Prepared]) -> Prepared | None:
        """Prepare the choices of one backend on all ranks alike; None where the engine keeps its own on all of them.

        A rank on which ``resolve`` fails, or that lacks memory, takes part in the comparison with what it has, so that no
        rank serves a choice that another one cannot: :attr:`Prepared.most_tokens` is then that of all ranks. Raises
        :class:`mla_tune.errors.EnvironmentMismatchError` where ranks differ in policy or setting and are told to refuse.
        """
        service = self.serve(settings)
        try:
            found = resolve(service)
        # Ours, not the engine's: all ranks serve as they would without us.
        except Exception:
            _log.exception("mla-tune failed in preparing %s; the engine keeps its own choice", what)
            found = Prepared(kept=(f"preparing {what} failed",), most_tokens=0)
        ranks = gather((found.choice, found.most_tokens), group=self.group())
        most_tokens = min(tokens for _, tokens in ranks)
        if found.deciders and (most_tokens <= 0 or len({choice for choice, _ in ranks}) > 1):
            _log.warning("the engine's own choice is kept on all ranks: not every rank can choose %s alike", what)
            found = Prepared(kept=(f"not every rank can choose {what} alike",))
        self.announce(found.deciders, found.kept)
        return msgspec.structs.replace(found, most_tokens=most_tokens) if found.deciders else None

    def announce(self, deciders: Sequence[Decider], kept: Iterable[str]) -> None:
        """One line for each model: what decides, whether it was measured here, what is hooked, what is left and why."""
        if self.service is None:
            return
        taken = (key.rpartition(":")[2] for key in self.hooks.taken)
        hooked = ", ".join(name for name in taken if not name.endswith("__init__")) or "nothing"
        left = [f"left: {reason}" for reason in (*kept, *self.hooks.left.values())]
        line = "; ".join(
            (_policy(self.service), f"mode {_mode(self.service)}", _sites(deciders), f"hooked: {hooked}", *left)
        )
        if line not in self.announced:
            self.announced.add(line)
            _log.info("mla-tune %s: %s", __version__, line)


class Once:
    """Logs the first error of a hook and counts them all."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = False

    def report(self, counters: SiteCounters, reason: str) -> None:
        """To be called while the exception is handled.

        The choice goes on: a rank that switched it off alone would choose otherwise than the ranks beside it.
        """
        counters.fell_back(reason)
        if not self._said:
            self._said = True
            _log.exception(
                "mla-tune failed in %s; the engine's own choice is kept, each time that it fails", self._what
            )


def matching_model(layers: Mapping[LayerType, int], topk: int, local_heads: int) -> tuple[ModelConfig, int] | str:
    """The model of the policy whose layers these are, and its padded heads per rank; or why there is none.

    A model with the same layer types, top-k and heads but other layer counts (GLM-5, a pruned one) runs the same
    kernels on the same shapes, and takes that model's tables.
    """
    h_q = 64 if local_heads <= 64 else 128  # SGLang pads like this, and FlashMLA has no other form
    alike = [
        model
        for model in MODELS.values()
        if model.topk == topk and h_q in model.heads and all(model.layer_count(layer) for layer in layers)
    ]
    if not alike or local_heads > 128:
        names = ", ".join(sorted(layers))
        return f"no known model has layers {names} with top-k {topk} and {local_heads} heads per rank"
    exact = [model for model in alike if dict(model.layers) == dict(layers)]
    return (exact or alike)[0], h_q


def shape_of(extend: list[int], prefix: list[int]) -> tuple[int, int, int]:
    """Query tokens, context tokens and requests; requests that pad the batch bring no tokens and are none."""
    num_qo_tokens = sum(extend)
    return num_qo_tokens, num_qo_tokens + sum(prefix), len(extend) - extend.count(0)


def paged_limit(decider: Decider) -> int:
    """The largest padded count at which the KV-cache kernel is known to run."""
    table = decider.resolved.table
    if table is None:
        return 0
    bounds = [limit.num_qo_tokens for limit in table.limits if limit.candidate in PAGED]
    return min([*bounds, table.measured.num_qo_tokens[1]])


def user_set(name: str) -> str | None:
    """``NAME=value`` of an environment variable of the engine that is set, which only a user or another plugin does."""
    value = os.environ.get(name)
    return None if value is None else f"{name}={value}"


def reserve(most: int, bytes_of: Callable[[int], int], allocate: Callable[[int], object] | None = None) -> int:
    """The most tokens, up to ``most``, whose ``bytes_of`` this process's GPU has free now: halved until they fit.

    What is allocated stays with torch's allocator, for the kernels to come. ``allocate`` is torch's own, on the GPU;
    without a GPU nothing bounds.
    """
    torch = sys.modules.get("torch")
    if allocate is None:
        if torch is None or not torch.cuda.is_available():
            return most

        def allocate(size: int) -> object:
            return torch.empty(size, dtype=torch.uint8, device="cuda")

    while most > 0:
        try:
            allocate(bytes_of(most))
        # The class is torch's, which is not ours to import; whatever else it is goes on.
        except Exception as error:
            if not out_of_memory(error):
                raise
            most //= 2
        else:
            break
    return most


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory; torch, whose error it is, is not ours to import."""
    return type(error).__name__ == "OutOfMemoryError"


def paged_bytes(num_qo_tokens: int, h_q: int, sm_count: int = 160) -> int:
    """Memory of FlashMLA's KV-cache kernel beyond its output.

    A float32 partial result of 512 values and its logarithm for
    every query, head and part of the schedule, of which there are at most ``sm_count``, and the merged logarithms.
    """
    return ((num_qo_tokens + sm_count) * 513 + num_qo_tokens) * h_q * 4


def _sites(deciders: Sequence[Decider]) -> str:
    layers: dict[str, list[str]] = {}
    for decider in deciders:
        place, rule = _site(decider)
        layers.setdefault(f"{place}, by {{}}: {rule}", []).append(decider.resolved.layer)
    return "; ".join(text.format(", ".join(of)) for text, of in layers.items()) or "no site of this model"


def _mode(service: Service) -> str:
    recorder = service.recorder
    return service.dispatcher.switches.mode + (f", recording to {recorder.path}" if recorder is not None else "")


def _policy(service: Service) -> str:
    dispatcher = service.dispatcher
    return f"no policy ({dispatcher.source})" if dispatcher.policy is None else f"policy {dispatcher.summary}"


def _site(decider: Decider) -> tuple[str, str]:
    """Where it decides, and who decides there."""
    resolved = decider.resolved
    heads = "" if resolved.h_q is None else f" with {resolved.h_q} heads"
    rule = resolved.rule.value if decider.serves else f"the engine's own choice ({resolved.fallback})"
    return f"{resolved.site} of {resolved.model}{heads}", rule.replace("{", "(").replace("}", ")")
