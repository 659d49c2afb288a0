"""Whether this machine is the one that a policy was measured on: its GPU, and the builds of its kernel libraries."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mla_tune.policy.schema import Policy

if TYPE_CHECKING:
    from mla_tune.hardware.nvml import GpuIdentity

_SAME_MODULE = {
    "sgl-flash-mla": "flash-mla",
    "flash-mla": "sgl-flash-mla",
    "sgl-deep-gemm": "deep-gemm",
    "deep-gemm": "sgl-deep-gemm",
}
"""Distributions that bring the same module: a fork and its upstream are different builds."""


def mismatches(policy: Policy | None, gpu: GpuIdentity | None) -> list[str]:
    """How this machine differs from the measured one in what thresholds and limits depend on; one line each."""
    if policy is None:
        return []
    lines = []
    if gpu is None or gpu.sku not in policy.gpu.skus or gpu.sm_count != policy.gpu.sm_count:
        here = "no visible GPU" if gpu is None else f"{gpu.sku} with {gpu.sm_count} SMs"
        wanted = " or ".join(policy.gpu.skus)
        lines.append(f"the GPU must be the measured {wanted} with {policy.gpu.sm_count} SMs: got {here}")
    for library in policy.environment.libraries:
        installed = _installed(library.name)
        if installed is None:
            other = _SAME_MODULE.get(library.name, "")
            replaced = _installed(other)
            if replaced:  # without any metadata there is nothing to compare
                lines.append(
                    f"{library.name} {library.version} must be the measured build: got {other} {replaced} in its place"
                )
        elif installed != library.version:
            lines.append(f"{library.name} must be the measured version {library.version}: got {installed}")
    return lines


def _installed(distribution: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return version(distribution) if distribution else None
    except PackageNotFoundError:
        return None
