"""The driver's management library (NVML) behind ctypes: a serving process asks it without a package or a CUDA context.

A library that is absent is no driver. One that is there and does not answer raises :class:`EnvironmentMismatchError`, so
that a machine with a GPU never passes for one without. Names and codes are those of ``nvml.h``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, Structure, byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p, create_string_buffer
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_tune.errors import EnvironmentMismatchError

LIBRARY = "libnvidia-ml.so.1"
CONTROL_DEVICE = Path("/dev/nvidiactl")
"""There wherever this process may use an NVIDIA GPU."""
_TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE; driver versions and UUIDs (80 and 96 at most) fit too
INVALID_ARGUMENT, NOT_SUPPORTED, FUNCTION_NOT_FOUND = 2, 3, 13
_VGPU = 2  # NVML_GPU_VIRTUALIZATION_MODE_VGPU


class _Memory(Structure):
    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


@dataclass(frozen=True, slots=True)
class Answer:
    """A number or a text, or why the driver does not tell it."""

    value: Any
    """None where ``code`` is not 0."""
    code: int = 0
    reason: str = ""
    """One line, empty where ``code`` is 0."""

    @property
    def absent(self) -> bool:
        """The device or the driver has no such thing, as opposed to a reading that failed."""
        return self.code in (NOT_SUPPORTED, FUNCTION_NOT_FOUND)


class Driver:
    """An initialized library. Every question gives an :class:`Answer`; a function that is missing is one that fails."""

    def __init__(self, library: CDLL) -> None:
        self._library = library

    def call(self, function: str, *arguments: Any) -> Answer:
        """Call ``function``; the answer has no value."""
        try:
            code = int(getattr(self._library, function)(*arguments))
        except AttributeError:
            return Answer(None, FUNCTION_NOT_FOUND, f"the library has no {function}")
        return Answer(None, code, "" if code == 0 else f"{function}: {self._meaning(code)}")

    def device_count(self) -> Answer:
        """Devices that the driver shows this process."""
        return self._number("nvmlDeviceGetCount_v2", c_uint())

    def device(self, index: int) -> Answer:
        """Handle of the device with this number in PCI bus order."""
        handle = c_void_p()
        answer = self.call("nvmlDeviceGetHandleByIndex_v2", c_uint(index), byref(handle))
        return answer if answer.code else Answer(handle)

    def uuid(self, device: c_void_p) -> Answer:
        """``GPU-...``."""
        return self._text("nvmlDeviceGetUUID", device)

    def product(self, device: c_void_p) -> Answer:
        """For example ``NVIDIA H200``."""
        return self._text("nvmlDeviceGetName", device)

    def version(self) -> Answer:
        """Version of the driver."""
        return self._text("nvmlSystemGetDriverVersion")

    def cuda_cores(self, device: c_void_p) -> Answer:
        """FP32 lanes."""
        return self._number("nvmlDeviceGetNumGpuCores", c_uint(), device)

    def capability(self, device: c_void_p) -> Answer:
        """Compute capability, as (major, minor)."""
        major, minor = c_int(), c_int()
        answer = self.call("nvmlDeviceGetCudaComputeCapability", device, byref(major), byref(minor))
        return answer if answer.code else Answer((major.value, minor.value))

    def memory_bytes(self, device: c_void_p) -> Answer:
        """All memory of the device."""
        memory = _Memory()
        answer = self.call("nvmlDeviceGetMemoryInfo", device, byref(memory))
        return answer if answer.code else Answer(memory.total)

    def power_limit_mw(self, device: c_void_p) -> Answer:
        """The power limit in force, milliwatts."""
        return self._number("nvmlDeviceGetEnforcedPowerLimit", c_uint(), device)

    def is_partitioned(self, device: c_void_p) -> Answer:
        """Whether MIG is on: CUDA then sees slices of the device and never the whole."""
        current, pending = c_uint(), c_uint()
        answer = self.call("nvmlDeviceGetMigMode", device, byref(current), byref(pending))
        return answer if answer.code else Answer(bool(current.value))

    def is_vgpu(self, device: c_void_p) -> Answer:
        """Whether a hypervisor shares the device with other machines."""
        answer = self._number("nvmlDeviceGetVirtualizationMode", c_int(), device)
        return answer if answer.code else Answer(answer.value == _VGPU)

    def _number(self, function: str, box: c_int | c_uint, *arguments: Any) -> Answer:
        answer = self.call(function, *arguments, byref(box))
        return answer if answer.code else Answer(box.value)

    def _text(self, function: str, *arguments: Any) -> Answer:
        buffer = create_string_buffer(_TEXT_BYTES)
        answer = self.call(function, *arguments, buffer, c_uint(_TEXT_BYTES))
        return answer if answer.code else Answer(buffer.value.decode(errors="replace"))

    def _meaning(self, code: int) -> str:
        try:
            describe = self._library.nvmlErrorString
        except AttributeError:
            return f"error {code}"
        describe.restype = c_char_p
        text = describe(code)
        return f"{text.decode(errors='replace')} (error {code})" if text else f"error {code}"


@contextmanager
def open_driver() -> Iterator[Driver | None]:
    """The driver, or None on a machine without one. Raises :class:`EnvironmentMismatchError` where it does not answer."""
    try:
        library = CDLL(LIBRARY)
    except OSError as error:
        if "No such file" in str(error) and not CONTROL_DEVICE.exists():
            yield None
            return
        raise refusal(f"{LIBRARY} cannot be loaded: {error}") from None
    driver = Driver(library)
    started = driver.call("nvmlInit_v2")
    if started.code:
        raise refusal(started.reason)
    try:
        yield driver
    finally:
        driver.call("nvmlShutdown")


def refusal(reason: str) -> EnvironmentMismatchError:
    """The error for a driver that is there and does not say which GPU this is."""
    return EnvironmentMismatchError(
        f"the NVIDIA driver must say which GPU this is: {' '.join(reason.split())}; accepted: a machine or container where "
        "`nvidia-smi` works (containers: driver capability 'utility'); repair it, or pass --gpu cpu"
    )
