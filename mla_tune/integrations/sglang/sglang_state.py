"""What SGLang says of its process: releases, ranks, the user's settings, and which batches are made up."""

from __future__ import annotations

from typing import Any

from mla_tune.integrations.engine_process import EngineProcess
from mla_tune.integrations.seams import Hooks
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.sites.provider import SGLANG

V4_RELEASES = ("0.5.22", "0.5.23")
RELEASES = ("0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21", *V4_RELEASES)
"""Releases of the wheels that tests/engines/sglang runs with. The hooks use more of SGLang than the signatures of what they
wrap (fields of its batches and backends), which no check at start could see."""


def parallel() -> Any:
    """SGLang's parallel state of this process."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


def records() -> bool:
    """Whether this rank records shapes: one of those that share each forward does."""
    return int(parallel().attn_tp_rank) == 0


def user_argument(server_args: Any, name: str) -> Any:
    """What the user gave SGLang for an argument, on the command line or in Python; None for what SGLang resolved itself.

    From 0.5.19 on a record keeps the user's input, and what was resolved stands beside it. 0.5.17 and 0.5.18 write what
    they resolve over the input, and list what that was: a field in that list was not the user's.
    """
    raw = getattr(server_args, "_raw_input", None)
    if raw is not None and name in raw:
        return raw[name]
    value = getattr(server_args, name, None)
    resolved = getattr(server_args, "_resolved_overrides", None) or ()
    overwritten = getattr(server_args, "_declarations_materialized", False)
    return None if overwritten and any(name in fields for _, fields in resolved) else value


def made_up(forward_batch: Any) -> bool:
    """Whether no request is behind a batch: a warm-up, a graph's capture, or the padding of an idle data-parallel rank.

    A batch of requests lists them; the view of it that a prefill graph replays has no list, but their sampling parameters.
    """
    if forward_batch.rids:
        return False
    sampling = forward_batch.sampling_info
    return sampling is None or not len(sampling)


def chunk_tokens(most: int) -> int:
    """Query tokens of the largest prefill that SGLang makes, at most ``most``."""
    try:
        from sglang.srt.runtime_context import get_schedule

        chunk = int(get_schedule().chunked_prefill_size or 0)
    except (ImportError, AttributeError, RuntimeError, ValueError):  # what SGLang raises for what nobody has published
        return most
    return min(most, chunk) if chunk > 0 else most


def _tensor_parallel_group() -> Any:
    """The CPU process group of the ranks that share forwards, or None where SGLang has made no group."""
    try:
        return parallel().tp_group.cpu_group
    except (AssertionError, AttributeError, RuntimeError, ValueError):  # what releases raise where nobody has made one
        return None


def _load() -> Dispatcher:
    return Dispatcher.for_this_gpu(fallback="incumbent", provider=SGLANG)


PROCESS = EngineProcess(Hooks("sglang"), _tensor_parallel_group, _load)
