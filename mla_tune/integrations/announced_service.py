"""The service of one engine process: made when the first backend is built, and announced in one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from mla_tune import __version__
from mla_tune.runtime.decider import Decider, Service
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.runtime.ranks import agree

_log = logging.getLogger("mla_tune")


def make_service(*, group: Any, engine: str, provider: str) -> Service:
    """Load the policy and compare it over ``group``; see :func:`mla_tune.runtime.ranks.agree`, whose refusal it raises.

    ``engine``: the user's settings for the engine that decide beside the policy. ``provider``: whose kernels it runs around
    attention, see :meth:`mla_tune.runtime.dispatcher.Dispatcher.for_this_gpu`.
    """
    dispatcher = Dispatcher.for_this_gpu(fallback="incumbent", provider=provider)
    return Service(agree(dispatcher, group=group, engine=engine))


def announce(service: Service, deciders: Sequence[Decider], hooked: str) -> None:
    """One line: what decides, whether it was measured here, what is hooked, what stays with the engine and why."""
    layers: dict[str, list[str]] = {}
    for decider in deciders:
        place, rule = _site(decider)
        layers.setdefault(f"{place}, by {{}}: {rule}", []).append(decider.resolved.layer)
    sites = "; ".join(text.format(", ".join(of)) for text, of in layers.items()) or "no site of this model"
    _log.info("mla-tune %s: %s; mode %s; %s; %s", __version__, _policy(service), _mode(service), sites, hooked)


def _mode(service: Service) -> str:
    recorder = service.recorder
    return service.dispatcher.switches.mode + (f", recording to {recorder.path}" if recorder is not None else "")


def _policy(service: Service) -> str:
    dispatcher = service.dispatcher
    policy = dispatcher.policy
    if policy is None:
        return f"no policy ({dispatcher.source})"
    differs = "; ".join(dispatcher.differences)
    match = f"differs from this machine: {differs}" if differs else "matches this machine"
    gpu = f"{policy.gpu.sku} with {policy.gpu.sm_count} SMs"
    return f"policy {dispatcher.source} (sha256 {dispatcher.digest[:12]}, {policy.evidence}, {gpu}, {match})"


def _site(decider: Decider) -> tuple[str, str]:
    """Where it decides, and who decides there."""
    resolved = decider.resolved
    heads = "" if resolved.h_q is None else f" with {resolved.h_q} heads"
    rule = resolved.rule.value if decider.serves else f"the engine's own choice ({resolved.fallback})"
    return f"{resolved.site} of {resolved.model}{heads}", rule.replace("{", "(").replace("}", ")")
