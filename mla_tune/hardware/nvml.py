"""Which GPU this process uses, asked of the driver without a CUDA context of its own or a package.

A serving process asks once. The device is the one that torch computes on, by its UUID; in a process without a CUDA
context it is the one that CUDA would take, as far as the driver can tell. The full environment of a measurement is
:mod:`mla_tune.bench.environment`'s.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.hardware.sku import known_sm_count, sku_name
from mla_tune.notice import say_once

if TYPE_CHECKING:
    import ctypes

    from mla_tune.hardware.driver import Answer, Driver

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """One physical GPU, as its driver names it."""

    product: str
    """For example ``NVIDIA H200``. A form (PCIe, NVL) or a vGPU's profile is part of it."""
    sku: str
    sm_count: int
    """0 where neither the driver nor the product's name tells."""
    driver: str
    """Version; empty where the driver does not tell."""
    uuid: str = ""
    """``GPU-...``; empty where the driver does not tell."""
    memory_gib: int = 0
    """All memory, rounded to whole GiB; 0 where the driver does not tell."""
    power_limit_w: int = 0
    """The power limit in force; 0 where the driver does not tell."""


def detect_gpu(index: int = 0) -> GpuIdentity | None:
    """The GPU that torch computes on in this process, else the ``index``-th that CUDA would show it; None if there is none.

    Raises :class:`EnvironmentMismatchError` where there is a driver and the GPU cannot be told: the driver does not
    answer, MIG cuts the GPU into slices, or CUDA's order of different GPUs is not the driver's. A single reading that is
    missing is said once and left out.
    """
    wanted = uuid_in_use() or visible_device(os.environ.get("CUDA_VISIBLE_DEVICES"), index)
    if wanted is None:
        return None
    from mla_tune.hardware.driver import open_driver  # a process that names its policy file never needs it

    with open_driver() as driver:
        if driver is None:
            return None
        device = _by_index(driver, wanted) if isinstance(wanted, int) else _by_uuid(driver, wanted)
        return None if device is None else _identify(driver, device)


def uuid_in_use() -> str | None:
    """UUID of the GPU that torch computes on in this process; None where it has no CUDA context yet. Imports nothing."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return None
    uuid = str(getattr(cuda.get_device_properties(cuda.current_device()), "uuid", ""))
    return None if not uuid else uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def visible_device(variable: str | None, index: int) -> int | str | None:
    """CUDA's number, or (the start of) a UUID, of the ``index``-th visible GPU; None if there is none.

    As CUDA reads the variable: unset shows all GPUs; the list ends at the first entry that is not of the first one's kind
    (number, ``GPU-`` or ``MIG-``), so that ``-1`` hides the rest; a number may have a tail (``1x`` is 1); an entry that
    occurs twice hides all.
    """
    if variable is None:
        return index
    devices: list[int | str] = []
    entries = [part.strip() for part in variable.split(",")]
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), None)
    for entry in entries:
        device = _number(entry) if prefix is None else entry if entry.startswith(prefix) else None
        if device is None:
            break
        if device in devices:
            return None
        devices.append(device)
    return devices[index] if index < len(devices) else None


def sm_count(cuda_cores: int, capability: tuple[int, int]) -> int:
    """Multiprocessors from FP32 lanes: 64 each up to sm_80, 128 from sm_86 on (CUDA programming guide)."""
    return cuda_cores // (64 if capability <= (8, 0) else 128)


def _number(entry: str) -> int | None:
    """The number that an entry begins with, as C's ``strtoul`` reads it; None for none and for a negative one."""
    digits = entry.removeprefix("+")
    length = next((at for at, letter in enumerate(digits) if letter not in "0123456789"), len(digits))
    return int(digits[:length]) if length else None


def _by_index(driver: Driver, index: int) -> ctypes.c_void_p | None:
    """The device with this number in CUDA's order, which must be the driver's."""
    from mla_tune.hardware.driver import INVALID_ARGUMENT

    chosen = driver.device(index)
    if chosen.code == INVALID_ARGUMENT:
        return None
    device: ctypes.c_void_p = _required(chosen)
    handles = [driver.device(other) for other in range(_required(driver.device_count()))]
    others = [answer.value for answer in handles if not answer.code]
    products = {driver.product(other).value for other in others}
    in_pci_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    sliced = {bool(driver.is_partitioned(other).value) for other in others}
    if (len(products) > 1 and not in_pci_order) or len(sliced) > 1:
        found = ", ".join(sorted(map(str, products))) + (", some of them in MIG mode" if len(sliced) > 1 else "")
        raise EnvironmentMismatchError(
            f"the GPU must be known where a machine has several kinds: got {found}, and CUDA numbers them in its own "
            "order; set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name the GPU by its UUID (`nvidia-smi -L`) in CUDA_VISIBLE_DEVICES"
        )
    return device


def _by_uuid(driver: Driver, wanted: str) -> ctypes.c_void_p | None:
    """The device of a UUID that may be cut short as long as one GPU has it."""
    if wanted.startswith("MIG-"):
        raise _slice_refusal(wanted)
    found = []
    for index in range(_required(driver.device_count())):
        answer = driver.device(index)
        uuid = answer if answer.code else driver.uuid(answer.value)
        if uuid.code:
            say_once(f"GPU {index} of the driver is left out of the search for {wanted}: {uuid.reason}")
        elif uuid.value.startswith(wanted):
            found.append(answer.value)
    if not found and wanted == uuid_in_use():
        raise _slice_refusal(f"{wanted}, which torch computes on and the driver lists as no whole GPU")
    return found[0] if len(found) == 1 else None


def _identify(driver: Driver, device: ctypes.c_void_p) -> GpuIdentity:
    product: str = _required(driver.product(device))
    sliced, shared = driver.is_partitioned(device), driver.is_vgpu(device)
    if sliced.value:
        raise _slice_refusal(f"{product} in MIG mode")
    readings = {
        "UUID": driver.uuid(device),
        "memory": driver.memory_bytes(device),
        "power limit": driver.power_limit_mw(device),
        "driver version": driver.version(),
    }
    memory_gib = round((readings["memory"].value or 0) / _GIB)
    sku = sku_name(product, memory_gib=memory_gib, shared=bool(shared.value))
    cores = driver.cuda_cores(device)
    capability = driver.capability(device)
    readings["SM count"] = cores if cores.code else capability
    missing = [f"{name} ({answer.reason})" for name, answer in readings.items() if answer.code]
    failed = {"MIG mode": sliced, "virtualization": shared}  # what a device does not have is no missing reading
    missing += [f"{name} ({answer.reason})" for name, answer in failed.items() if answer.code and not answer.absent]
    if missing:
        say_once(
            f"the driver does not tell everything of {product}, and what is missing is not compared: {', '.join(missing)}"
        )
    return GpuIdentity(
        product=product,
        sku=sku,
        sm_count=known_sm_count(sku) if readings["SM count"].code else sm_count(cores.value, capability.value),
        driver=readings["driver version"].value or "",
        uuid=readings["UUID"].value or "",
        memory_gib=memory_gib,
        power_limit_w=round((readings["power limit"].value or 0) / 1000),
    )


def _required(answer: Answer) -> Any:
    """The value of an answer without which nobody knows which GPU this is."""
    from mla_tune.hardware.driver import refusal

    if answer.code:
        raise refusal(answer.reason)
    return answer.value


def _slice_refusal(what: str) -> EnvironmentMismatchError:
    return EnvironmentMismatchError(
        f"a GPU must be whole: got {what}; a MIG slice has fewer SMs and less bandwidth than what any policy was measured "
        "on; switch MIG off (`nvidia-smi -mig 0`), or name another GPU in CUDA_VISIBLE_DEVICES"
    )
