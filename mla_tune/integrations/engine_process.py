"""What the hooks of one engine process share, whichever the engine: the service, its one line, the model, the limits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mla_tune.integrations.announced_service import announce
from mla_tune.integrations.seams import Hooks
from mla_tune.runtime.counters import SiteCounters
from mla_tune.runtime.decider import Decider, Service
from mla_tune.sites.candidates import PAGED
from mla_tune.sites.site import MODELS, LayerType, ModelConfig

_log = logging.getLogger("mla_tune")


@dataclass(slots=True)
class Process:
    """One per process: engines build several backends (target, draft, one for each group of layers) from one policy."""

    hooks: Hooks
    service: Service | None = None
    announced: bool = False

    def announce(self, deciders: list[Decider], kept: Iterable[str]) -> None:
        """The line at start, once."""
        if self.announced or self.service is None:
            return
        self.announced = True
        taken = (key.rpartition(":")[2] for key in self.hooks.taken)
        hooked = ", ".join(name for name in taken if not name.endswith("__init__")) or "nothing"
        left = [f"left: {reason}" for reason in (*kept, *self.hooks.moved.values())]
        announce(self.service, deciders, "; ".join([f"hooked: {hooked}", *left]))

    def log_failure(self, what: str) -> None:
        """Say that something of ours failed, while the exception is handled; the engine serves as without us."""
        _log.exception("mla-tune failed in %s; the engine keeps its own choice", what)


class Once:
    """Logs the first error of a hook and counts them all."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = False

    def report(self, counters: SiteCounters, reason: str) -> None:
        """To be called while the exception is handled."""
        counters.fell_back(reason)
        if not self._said:
            self._said = True
            _log.exception("mla-tune failed in %s; the engine's own choice is kept, there and from now on", self._what)


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
    """The largest padded count at which ``with_kvcache`` is known to run."""
    table = decider.resolved.table
    if table is None:
        return 0
    bounds = [limit.num_qo_tokens for limit in table.limits if limit.candidate in PAGED]
    return min([*bounds, table.measured.num_qo_tokens[1]])


def user_set(name: str) -> str | None:
    """``NAME=value`` of an environment variable of the engine that is set, which only a user or another plugin does."""
    value = os.environ.get(name)
    return None if value is None else f"{name}={value}"
