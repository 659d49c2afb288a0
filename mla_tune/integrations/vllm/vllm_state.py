"""What vLLM says of its process: releases, ranks, the user's settings, and when it runs a forward of its own making."""

from __future__ import annotations

from typing import Any

from mla_tune.integrations.engine_process import EngineProcess
from mla_tune.integrations.seams import Hook, Hooks, Seam, installed_version
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.sites.provider import VLLM
from mla_tune.sites.site import SiteName

RELEASES: tuple[str, ...] = ("0.31.0", "0.32.0", "0.33.0")
"""Releases of the wheels that tests/engines/vllm runs with. The hooks use more of vLLM than the signatures of what they
wrap (fields of its metadata, buffers that it fills), which no check at start could see."""
_SCHEDULER_BYTES_PER_ENTRY = 20
"""Shared memory that FlashMLA's scheduler once took per batch entry, and 4 bytes more (sgl-project/sglang#25502). The build
that was measured has no such bound; a build that was not measured is taken to have it."""

DUMMY_HOOK = Hook("which forwards are counted", RELEASES)
DUMMY_RUN = Seam("GPUModelRunner._dummy_run", ("self", "num_tokens"))


def _tensor_parallel_group() -> Any:
    """The CPU process group of the ranks that share forwards, or None where vLLM has made no group."""
    from vllm.distributed.parallel_state import get_tp_group

    try:
        return get_tp_group().cpu_group
    except AssertionError:  # what vLLM raises before there is a group
        return None


def _load() -> Dispatcher:
    """What serves vLLM on this GPU: tables that were measured with this very wheel, or a file that the user names."""
    return Dispatcher.for_this_gpu(fallback="incumbent", provider=VLLM)


PROCESS = EngineProcess(Hooks("vllm"), _tensor_parallel_group, _load)


def most_entries(dispatcher: Dispatcher) -> int | None:
    """Batch entries that the KV-cache kernel is trusted with; None where the tables' limits are of this very build."""
    policy, here = dispatcher.policy, f"{VLLM}=={installed_version(VLLM)}"
    if policy is None or all(
        here in table.builds for table in policy.tables if table.site == SiteName.PREFILL_ATTENTION
    ):
        return None
    return max(0, policy.environment.shared_memory_optin_bytes - 4) // _SCHEDULER_BYTES_PER_ENTRY


def user_setting() -> str | None:
    """What the user told vLLM that rules out a choice per batch, if anything."""
    import vllm.envs as envs

    return "VLLM_BATCH_INVARIANT=1" if envs.VLLM_BATCH_INVARIANT else None


def capturing() -> bool:
    """Whether a CUDA graph is being captured: one answer would then serve every replay."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def records() -> bool:
    """Whether this rank records shapes: one of those that share each forward does."""
    from vllm.distributed.parallel_state import get_tp_group

    try:
        return bool(get_tp_group().rank_in_group == 0)
    except AssertionError:
        return True


def hook_runner(module: Any) -> None:
    """Mark the forwards that a runner makes up: warm-ups, profiling, and those of an idle data-parallel rank."""
    PROCESS.hooks.take(module, DUMMY_HOOK, {DUMMY_RUN: _around_dummy_run})


def _around_dummy_run(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    del instance
    before, PROCESS.fabricating = PROCESS.fabricating, True
    try:
        return wrapped(*args, **kwargs)
    finally:
        PROCESS.fabricating = before
