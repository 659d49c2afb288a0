"""What the vLLM hooks of one process share: the service, the versions and kernels it may serve, the user's settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mla_tune.integrations.engine_process import Process
from mla_tune.integrations.seams import Hooks, Seam, installed_version
from mla_tune.runtime.decider import Service
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.runtime.ranks import agree
from mla_tune.runtime.switches import POLICY_VARIABLE

TESTED = ["0.33.0"]
"""Versions of the wheel that tests/engines/vllm runs with; any other keeps its own choices. The hooks use more of vLLM than
the signatures of what they replace (fields of its metadata, buffers that it fills), which no check at start could see."""
LIBRARY = "vllm"
"""How a policy's environment names vLLM's own build of FlashMLA."""
_SCHEDULER_BYTES_PER_ENTRY = 20
"""Shared memory that FlashMLA's scheduler once took per batch entry, and 4 bytes more (sgl-project/sglang#25502). The build
that was measured has no such bound; a build that was not measured is taken to have it."""

_log = logging.getLogger("mla_tune")


@dataclass(slots=True)
class VllmProcess(Process):
    """One per process: vLLM builds a metadata builder for each group of caches, and a layer object for each layer."""

    most_entries: int | None = None
    """Batch entries that the KV-cache kernel is trusted with; None where the policy's limits are of this very build."""

    def serve(self, engine: str) -> Service:
        """The service; the first call loads the policy and compares it between the ranks of the tensor-parallel group.

        Raises :class:`mla_tune.errors.EnvironmentMismatchError` where they differ and are told to refuse.
        """
        if self.service is None:
            dispatcher = self._for_these_kernels(Dispatcher.for_this_gpu(fallback="incumbent"))
            self.service = Service(agree(dispatcher, group=_tensor_parallel_group(), engine=engine))
        return self.service

    def _for_these_kernels(self, dispatcher: Dispatcher) -> Dispatcher:
        """``dispatcher``, unless its policy ships and was measured with other kernels than the ones in vLLM's wheel."""
        policy = dispatcher.policy
        if policy is None or any(library.name == LIBRARY for library in policy.environment.libraries):
            return dispatcher  # versions were compared when it was loaded
        kernels = [f"{library.name} {library.version}" for library in policy.environment.libraries]
        difference = (
            f"the kernels must be those in vLLM {installed_version('vllm')}'s wheel: "
            f"{dispatcher.source} was measured with {', '.join(kernels) or 'none'}"
        )
        if dispatcher.switches.policy is None:
            step = f"sweep where vLLM is installed, or set {POLICY_VARIABLE} to the file to use it as it is"
            return Dispatcher(None, source=f"{difference}; {step}", fallback="incumbent", switches=dispatcher.switches)
        _log.warning("%s is used because %s names it, but %s", dispatcher.source, POLICY_VARIABLE, difference)
        dispatcher.differences += (difference,)
        opt_in_bytes = policy.environment.shared_memory_optin_bytes
        self.most_entries = max(0, opt_in_bytes - 4) // _SCHEDULER_BYTES_PER_ENTRY
        return dispatcher

    def take(
        self, module: Any, wrappers: dict[Seam, Callable[[Any], Callable[..., Any]]], uses: tuple[str, ...]
    ) -> None:
        """Hook ``module``, if this is a tested version that has everything the hooks use; else one warning."""
        release = installed_version("vllm").partition("+")[0]
        lacks = [name for name in uses if not _has(module, name)]
        if release in TESTED and not lacks:
            self.hooks.take(module, wrappers)
            return
        why = f"it has no {lacks[0]}" if lacks else f"vLLM {release} is not one that the hooks were tested with"
        self.hooks.moved[module.__name__] = why
        _log.warning(
            "mla-tune leaves %s on its own choice: %s; tested with %s", module.__name__, why, ", ".join(TESTED)
        )


PROCESS = VllmProcess(Hooks("vllm", tuple(TESTED)))


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
    except AssertionError:  # what vLLM raises before there is a group
        return True


def _tensor_parallel_group() -> Any:
    """The CPU process group of the ranks that share forwards, or None where vLLM has made no group."""
    from vllm.distributed.parallel_state import get_tp_group

    try:
        return get_tp_group().cpu_group
    except AssertionError:
        return None


def _has(module: Any, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None
