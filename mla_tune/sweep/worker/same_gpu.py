"""Whether a worker measures the GPU that the sweep was planned for, and goes on with the one it began with."""

from __future__ import annotations

from dataclasses import fields

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.hardware.builds import UNKNOWN
from mla_tune.hardware.nvml import GpuIdentity
from mla_tune.hardware.sku import Environment
from mla_tune.sweep.worker.messages import Hello

_READINGS = ("driver", "memory_gib", "power_limit_w")
_UNREAD = {0, UNKNOWN}
_NEXT = "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPU by its UUID (`nvidia-smi -L`) in CUDA_VISIBLE_DEVICES"


def require_same_gpu(planned: GpuIdentity | None, worker: Hello) -> None:
    """Raise :class:`EnvironmentMismatchError` unless the worker runs on ``planned``, which its parent sees.

    What one of the two cannot tell (an empty UUID, an SM count of 0) is not compared.
    """
    found = worker.environment
    if planned is None:
        raise _refusal("no GPU", f"{found.product} {worker.gpu_uuid}")
    here = (planned.uuid, planned.sm_count) if planned.uuid and worker.gpu_uuid else ("", planned.sm_count)
    there = (worker.gpu_uuid if here[0] else "", found.sm_count if planned.sm_count else 0)
    if (planned.sku, *here) != (found.sku, *there):
        raise _refusal(
            f"{planned.product} ({planned.sm_count} SMs, {planned.uuid or 'no UUID'})",
            f"{found.product} ({found.sm_count} SMs, {worker.gpu_uuid or 'no UUID'})",
        )


def require_unchanged(first: Environment, now: Environment) -> None:
    """Raise :class:`EnvironmentMismatchError` unless a worker that replaces another one runs where that one ran.

    A reading that one of the two could not take is not compared.
    """
    pairs = {field.name: (getattr(first, field.name), getattr(now, field.name)) for field in fields(Environment)}
    changed = [
        f"{name} was {before} and is {after}"
        for name, (before, after) in pairs.items()
        if before != after and not ({before, after} & _UNREAD if name in _READINGS else False)
    ]
    if changed:
        raise EnvironmentMismatchError(
            f"a sweep must stay on one machine as it is: {'; '.join(changed)}; what was measured is stored; run the same "
            "command again"
        )


def _refusal(planned: str, found: str) -> EnvironmentMismatchError:
    return EnvironmentMismatchError(
        f"a sweep must measure the GPU that it was planned for: its worker runs on {found}, and the sweep itself sees "
        f"{planned}; {_NEXT}"
    )
