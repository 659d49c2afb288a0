"""GPU products as sold, and the environment that a measurement belongs to.

This module parses and compares. It never looks at the machine: :mod:`mla_tune.hardware.nvml` and
:mod:`mla_tune.bench.environment` do. A chip is not a product: H100 SXM, PCIe and NVL, or H20 and H20-3e, differ in SMs,
clocks or bandwidth and share no thresholds.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass

from mla_tune.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sku:
    """One product: the SXM, HGX or NVL72 part. Another form of the same chip is another product, see :func:`sku_name`."""

    name: str
    """Canonical name, the stem of its policy file: ``nvidia-h200``."""
    product: str
    """The driver's whole product name without the vendor: ``H200``."""
    sm_count: int
    memory_gb: int
    """As sold. A driver reports 93 to 100 % of the number in GiB."""


SKUS: tuple[Sku, ...] = (
    Sku("nvidia-h20", "H20", 78, 96),
    Sku("nvidia-h100", "H100 80GB HBM3", 132, 80),
    Sku("nvidia-h200", "H200", 132, 141),
    Sku("nvidia-h800", "H800", 132, 80),
    Sku("nvidia-b200", "B200", 148, 180),
    Sku("nvidia-b300", "B300 SXM6 AC", 148, 288),
    Sku("nvidia-gb200", "GB200", 152, 186),
    Sku("nvidia-gb300", "GB300", 152, 279),
)
CPU = "cpu"
_MEMORY = (0.88, 1.06)
"""GiB that a driver reports over GB as sold, with some room. The nearest other product of a name has half or 1.2 times."""


def sku_name(product: str, *, memory_gib: int = 0, shared: bool = False) -> str:
    """Canonical SKU of a driver's product name: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100``.

    The whole name decides. Any other product gets a name of its own in the same form (``NVIDIA H100 PCIe`` ->
    ``nvidia-h100-pcie``, ``NVIDIA H200-71C``, a vGPU, -> ``nvidia-h200-71c``), so that it can be swept too and shares
    nothing with a known one. So does a GPU of a known name with another memory (``memory_gib``, 0 for unknown) or one
    that a hypervisor shares (``shared``).
    """
    words = re.sub(r"[^a-z0-9]+", "-", product.lower()).strip("-")
    bare = " ".join(product.split()).removeprefix("NVIDIA ")
    found = next((sku for sku in SKUS if sku.product == bare), None)
    if found is None:
        name = words if words.startswith("nvidia-") else f"nvidia-{words}"
        return f"{name}-other" if any(sku.name == name for sku in SKUS) else name
    low, high = (found.memory_gb * part for part in _MEMORY)
    odd = f"-{memory_gib}gib" if memory_gib and not low <= memory_gib <= high else ""
    return f"{found.name}{odd}{'-vgpu' if shared else ''}"


def known_sm_count(sku: str) -> int:
    """Multiprocessors of a known product; 0 for any other."""
    return next((known.sm_count for known in SKUS if known.name == sku), 0)


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


LATER_FIELDS = ("product", "memory_gib", "power_limit_w")
"""Fields of :class:`Environment` that exports and databases of before 0.3.0 do not have."""


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
    product: str = ""
    """The driver's name of the GPU; empty for ``cpu``, and in what was measured before 0.3.0, as the next two are 0."""
    memory_gib: int = 0
    """Memory of the GPU, rounded to whole GiB."""
    power_limit_w: int = 0
    """Power limit of the GPU; 0 too where the driver does not tell."""

    @property
    def id(self) -> str:
        """First 16 hex digits of a SHA-256 over all fields: the key of an environment in databases and exports.

        What an environment of before 0.3.0 lacks does not enter, so that its id stays what it was.
        """
        fields = asdict(self)
        stated = {name: value for name, value in fields.items() if name not in LATER_FIELDS or value}
        canonical = json.dumps(stated, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
