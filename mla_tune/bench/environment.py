"""The fingerprint of this machine: what a measurement depends on besides the shape, read off as an :class:`Environment`.

Nothing is imported that could touch the GPU except torch itself: a kernel library is identified by its metadata and by
a digest over its files, since two builds may carry one version.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from mla_tune.errors import EnvironmentMismatchError, MissingPackageError
from mla_tune.hardware.builds import (
    DISTRIBUTIONS,
    FLASH_MLA,
    UNKNOWN,
    distributions_of,
    flash_mla_package,
    installed_version,
    module_folder,
)
from mla_tune.hardware.digests import digest_library
from mla_tune.hardware.driver import refusal
from mla_tune.hardware.nvml import GpuIdentity, detect_gpu
from mla_tune.hardware.sku import CPU, Environment, KernelLibrary, sku_name
from mla_tune.notice import say_once

if TYPE_CHECKING:
    from types import ModuleType

_PROCESSORS = Path("/proc/cpuinfo")
_UNKNOWN_RELEASE = (
    "{name} in {folder} must have one readable version: got none, or several; what is measured now serves nowhere, since a "
    "policy must name the builds that it depends on; install {name} again with pip"
)


def detect_environment(gpu: bool) -> Environment:
    """What runs here: the GPU that torch calls current and its kernel libraries, or the processor.

    Raises :class:`MissingPackageError` without torch, and :class:`EnvironmentMismatchError` where a GPU is wanted and
    torch can use none, or the driver does not say which one it is. A kernel library of which nobody can tell the version
    is said in the log.
    """
    return _gpu_environment() if gpu else _cpu_environment()


def environment_without_torch(gpu: GpuIdentity | None) -> Environment:
    """What the driver and the installed packages tell of ``gpu``, or of the processor: for reading, no measurement has it.

    What torch alone knows is 0 or empty.
    """
    return Environment(
        sku=gpu.sku if gpu else CPU,
        sm_count=gpu.sm_count if gpu else 0,
        shared_memory_optin_bytes=0,
        driver=(gpu.driver or UNKNOWN) if gpu else processor_name(_processors()),
        cuda="",
        torch=installed_version("torch") or "",
        triton=_triton_version(),
        libraries=kernel_libraries() if gpu else (),
        product=gpu.product if gpu else "",
        memory_gib=gpu.memory_gib if gpu else 0,
        power_limit_w=gpu.power_limit_w if gpu else 0,
    )


def kernel_libraries() -> tuple[KernelLibrary, ...]:
    """The kernel libraries that a sweep runs here, sorted by name; none of them is imported. Of two FlashMLAs one runs.

    A library without metadata (a source tree on the path) goes by its project's name and the version :data:`UNKNOWN`.
    """
    libraries: list[KernelLibrary] = []
    for module in DISTRIBUTIONS:
        package = flash_mla_package() if module == FLASH_MLA else module
        folder = module_folder(package)
        if folder is None:
            continue
        sha256, names = digest_library(folder), distributions_of(package)
        stated = {name: found for name in names if (found := installed_version(name)) is not None}
        for name, release in (stated or {names[-1]: UNKNOWN}).items():
            if release == UNKNOWN:
                say_once(_UNKNOWN_RELEASE.format(name=name, folder=folder))
            libraries.append(KernelLibrary(name, release, sha256))
    return tuple(sorted(libraries, key=lambda library: library.name))


def processor_name(cpuinfo: Iterable[str]) -> str:
    """The model name in the lines of ``/proc/cpuinfo``; what Python knows of the processor where they have none."""
    for line in cpuinfo:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _gpu_environment() -> Environment:
    torch = _torch()
    if not torch.cuda.is_available():
        raise EnvironmentMismatchError(
            f"measuring a GPU needs one that torch can use: torch {torch.__version__} sees none; accepted: an NVIDIA "
            "GPU with its driver and a CUDA build of torch; check `nvidia-smi`, or pass --gpu cpu"
        )
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    gpu = detect_gpu()  # the same device, by the UUID that torch gives
    memory_gib = gpu.memory_gib if gpu else round(getattr(device, "total_memory", 0) / (1 << 30))
    return Environment(
        sku=gpu.sku if gpu else sku_name(device.name, memory_gib=memory_gib),
        sm_count=device.multi_processor_count,
        shared_memory_optin_bytes=device.shared_memory_per_block_optin,
        driver=_driver_version(),
        cuda=torch.version.cuda or "",
        torch=str(torch.__version__),
        triton=_triton_version(),
        libraries=kernel_libraries(),
        product=gpu.product if gpu else device.name,
        memory_gib=memory_gib,
        power_limit_w=gpu.power_limit_w if gpu else 0,
    )


def _cpu_environment() -> Environment:
    torch = _torch()
    return Environment(
        sku=CPU,
        sm_count=torch.get_num_threads(),
        shared_memory_optin_bytes=0,
        driver=processor_name(_processors()),
        cuda=torch.version.cuda or "",
        torch=str(torch.__version__),
        triton=_triton_version(),
        libraries=(),
    )


def _processors() -> list[str]:
    return _PROCESSORS.read_text(errors="replace").splitlines() if _PROCESSORS.is_file() else []


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise _missing("torch", error) from None
    return torch


def _driver_version() -> str:
    gpu = detect_gpu()
    if gpu is None:
        raise refusal("torch uses one, and no driver library lists it")
    return gpu.driver or UNKNOWN


def _triton_version() -> str:
    """Empty where Triton is absent: a CPU build of torch does not bring it."""
    for name in ("triton", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


def _missing(package: str, error: ImportError) -> MissingPackageError:
    return MissingPackageError(
        f'detecting the environment needs {package}: {error}; install it with: pip install "mla-tune[tune]"'
    )
