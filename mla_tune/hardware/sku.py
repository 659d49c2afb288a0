"""GPU products as sold, and the environment that a measurement belongs to.

This module parses and compares. It never looks at the machine: :mod:`mla_tune.hardware.nvml` and
:mod:`mla_tune.bench.environment` do. SM counts tell products of one architecture apart: H100 and H20 are both sm90 and
share no thresholds.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from mla_tune.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sku:
    """One product. ``sm_count`` is that of the SXM or HGX part where a name is sold in several forms."""

    name: str
    """Canonical name, the stem of its policy file: ``nvidia-h200``."""
    pattern: str
    """Regular expression over the driver's product name, for example ``NVIDIA H200``."""
    sm_count: int


SKUS: tuple[Sku, ...] = (
    Sku("nvidia-h20", r"\bH20\b", 78),
    Sku("nvidia-h100", r"\bH100\b", 132),
    Sku("nvidia-h200", r"\bH200\b", 132),
    Sku("nvidia-h800", r"\bH800\b", 132),
    Sku("nvidia-b200", r"\bB200\b", 148),
    Sku("nvidia-b300", r"\bB300\b", 148),
    Sku("nvidia-gb200", r"\bGB200\b", 152),
    Sku("nvidia-gb300", r"\bGB300\b", 152),
)
CPU = "cpu"


def sku_name(product: str) -> str:
    """Canonical SKU of a driver's product name: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100``.

    An unknown product gets its own name in the same form (``NVIDIA L4`` -> ``nvidia-l4``), so that it can be swept too.
    """
    for sku in SKUS:
        if re.search(sku.pattern, product):
            return sku.name
    words = re.sub(r"[^a-z0-9]+", "-", product.lower()).strip("-")
    return words if words.startswith("nvidia-") else f"nvidia-{words}"


def resolve_sku(argument: str) -> str:
    """Canonical SKU of what a user typed (``h200``, ``H200``, ``nvidia-h200``). Raises :class:`UsageError`."""
    word = argument.strip().lower()
    names = [CPU, *(sku.name for sku in SKUS)]
    for name in names:
        if word in (name, name.removeprefix("nvidia-")):
            return name
    if re.fullmatch(r"nvidia-[a-z0-9]+(-[a-z0-9]+)*", word):
        return word  # a product that was swept under its own name
    accepted = ", ".join(name.removeprefix("nvidia-") for name in names)
    raise UsageError(
        f"gpu must be a known SKU: got {argument!r}; accepted: auto, {accepted}, or a full name like nvidia-l4"
    )


@dataclass(frozen=True, slots=True)
class KernelLibrary:
    """One build of a kernel library: limits and thresholds belong to it."""

    name: str
    """Distribution name, for example ``sgl-flash-mla``."""
    version: str
    sha256: str
    """Digest over the library's compiled files (or its sources where it has none), in path order."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Everything that a measurement depends on besides the shape. Two equal environments may share measurements."""

    sku: str
    sm_count: int
    """Streaming multiprocessors; for ``cpu`` the threads that torch uses."""
    shared_memory_optin_bytes: int
    """Dynamic shared memory that one block may opt in to; 0 for ``cpu``."""
    driver: str
    """Driver version; for ``cpu`` the processor's model name."""
    cuda: str
    """CUDA version that torch was built for, empty for a CPU build."""
    torch: str
    triton: str
    libraries: tuple[KernelLibrary, ...]
    """Kernel libraries that were importable, sorted by name."""

    @property
    def id(self) -> str:
        """First 16 hex digits of a SHA-256 over all fields: the key of an environment in databases and exports."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
