"""Which GPU this process would use, asked of the driver's management library without a CUDA context or a package.

A serving process asks once, before it touches the GPU. The full environment of a measurement is
:mod:`mla_tune.bench.environment`'s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mla_tune.hardware.sku import sku_name

if TYPE_CHECKING:
    import ctypes

_LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE; driver versions and UUIDs (80 and 96 at most) fit too


@dataclass(frozen=True, slots=True)
class GpuIdentity:
    """One physical GPU, as its driver names it."""

    product: str
    """For example ``NVIDIA H200``."""
    sku: str
    sm_count: int
    driver: str


def detect_gpu(index: int = 0) -> GpuIdentity | None:
    """The ``index``-th GPU that CUDA_VISIBLE_DEVICES lets this process see; None without a driver or such a GPU.

    Indices are the driver's (PCI bus) order. CUDA's default order differs from it only on hosts that mix products:
    set ``CUDA_DEVICE_ORDER=PCI_BUS_ID`` there, as vendors advise anyway. A MIG slice is no product: None.
    """
    wanted = visible_device(os.environ.get("CUDA_VISIBLE_DEVICES"), index)
    if wanted is None:
        return None
    from ctypes import CDLL  # a process that names its policy file never needs it

    try:
        nvml = CDLL(_LIBRARY)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        return _identify(nvml, wanted)
    finally:
        nvml.nvmlShutdown()


def visible_device(variable: str | None, index: int) -> int | str | None:
    """The driver's index, or (the start of) a UUID, of the ``index``-th visible GPU; None if there is none.

    As CUDA reads the variable: unset shows all GPUs, and the list ends at the first entry that is neither a number nor
    a UUID (``-1`` or an empty entry hides the rest).
    """
    if variable is None:
        return index
    devices: list[int | str] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.isascii() and entry.isdigit():
            devices.append(int(entry))
        elif entry.startswith(("GPU-", "MIG-")):
            devices.append(entry)
        else:
            break
    return devices[index] if index < len(devices) else None


def sm_count(cuda_cores: int, capability: tuple[int, int]) -> int:
    """Multiprocessors from FP32 lanes: 64 each up to sm_80, 128 from sm_86 on (CUDA programming guide)."""
    return cuda_cores // (64 if capability <= (8, 0) else 128)


def _identify(nvml: ctypes.CDLL, wanted: int | str) -> GpuIdentity | None:
    from ctypes import byref, c_int, c_uint, create_string_buffer

    device = _handle(nvml, wanted)
    name, driver = create_string_buffer(_NAME_BYTES), create_string_buffer(_NAME_BYTES)
    cores, major, minor = c_uint(), c_int(), c_int()
    if device is None or any(
        (
            nvml.nvmlDeviceGetName(device, name, _NAME_BYTES),
            nvml.nvmlSystemGetDriverVersion(driver, _NAME_BYTES),
            nvml.nvmlDeviceGetNumGpuCores(device, byref(cores)),
            nvml.nvmlDeviceGetCudaComputeCapability(device, byref(major), byref(minor)),
        )
    ):
        return None
    product = name.value.decode(errors="replace")
    sms = sm_count(cores.value, (major.value, minor.value))
    return GpuIdentity(product, sku_name(product), sms, driver.value.decode(errors="replace"))


def _handle(nvml: ctypes.CDLL, wanted: int | str) -> ctypes.c_void_p | None:
    """The device of an index, or of a UUID that may be cut short as long as one GPU has it."""
    from ctypes import byref, c_uint, c_void_p, create_string_buffer

    device, count = c_void_p(), c_uint()
    if isinstance(wanted, int):
        return device if nvml.nvmlDeviceGetHandleByIndex_v2(c_uint(wanted), byref(device)) == 0 else None
    nvml.nvmlDeviceGetCount_v2(byref(count))
    found = []
    for index in range(count.value):
        device, uuid = c_void_p(), create_string_buffer(_NAME_BYTES)
        failed = nvml.nvmlDeviceGetHandleByIndex_v2(c_uint(index), byref(device))
        if not failed and nvml.nvmlDeviceGetUUID(device, uuid, _NAME_BYTES) == 0:
            found += [device] if uuid.value.decode().startswith(wanted) else []
    return found[0] if len(found) == 1 else None
