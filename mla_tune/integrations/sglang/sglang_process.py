"""What the SGLang hooks of one process share: the service, and what the engine says of its ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_tune.integrations.announced_service import make_service
from mla_tune.integrations.engine_process import Process
from mla_tune.integrations.seams import Hooks
from mla_tune.runtime.decider import Service
from mla_tune.sites.provider import SGLANG

TESTED = ("0.5.23",)
"""Versions of the wheel that tests/engines/sglang runs with."""


@dataclass(slots=True)
class SglangProcess(Process):
    """SGLang's."""

    def serve(self, engine: str) -> Service:
        """The service; the first call loads the policy and compares it between the ranks of the tensor-parallel group.

        Raises :class:`mla_tune.errors.EnvironmentMismatchError` where they differ and are told to refuse.
        """
        if self.service is None:
            self.service = make_service(group=_tensor_parallel_group(), engine=engine, provider=SGLANG)
        return self.service


PROCESS = SglangProcess(Hooks("sglang", TESTED))


def parallel() -> Any:
    """SGLang's parallel state of this process."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


def records() -> bool:
    """Whether this rank records shapes: one of those that share each forward does."""
    return int(parallel().attn_tp_rank) == 0


def _tensor_parallel_group() -> Any:
    """The CPU process group of the ranks that share forwards, or None where SGLang has made no group."""
    try:
        return parallel().tp_group.cpu_group
    except (AttributeError, RuntimeError, ValueError):  # what SGLang raises for a field that nobody has written
        return None
