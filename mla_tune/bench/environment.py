"""The fingerprint of this machine: what a measurement depends on besides the shape, read off as an :class:`Environment`.

Nothing is imported that could touch the GPU except torch itself: a kernel library is identified by its metadata and by
a digest over its files, since two builds may carry one version.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mla_tune.errors import EnvironmentMismatchError, MissingPackageError
from mla_tune.hardware.builds import DISTRIBUTIONS, UNKNOWN
from mla_tune.hardware.driver import refusal
from mla_tune.hardware.nvml import detect_gpu
from mla_tune.hardware.sku import CPU, Environment, KernelLibrary, sku_name
from mla_tune.notice import say_once

if TYPE_CHECKING:
    from types import ModuleType

_CHUNK_BYTES = 1 << 20
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


def kernel_libraries() -> tuple[KernelLibrary, ...]:
    """The kernel libraries that could be imported here, sorted by name; none of them is imported.

    A library without metadata (a source tree on the path) goes by its project's name and the version :data:`UNKNOWN`.
    """
    libraries = []
    for module, names in DISTRIBUTIONS.items():
        folder = _module_folder(module)
        if folder is None:
            continue
        sha256 = digest_library(folder)
        named = ((name, list(distributions(name=name))) for name in names)
        installed = {name: _version(found, folder) for name, found in named if found}
        for name, release in (installed or {names[-1]: UNKNOWN}).items():
            if release == UNKNOWN:
                say_once(_UNKNOWN_RELEASE.format(name=name, folder=folder))
            libraries.append(KernelLibrary(name, release, sha256))
    return tuple(sorted(libraries, key=lambda library: library.name))


def _version(installed: list[Distribution], folder: Path) -> str:
    """The version that the metadata beside a package's folder state; unknown where none is readable or they differ.

    An upgrade that broke off leaves metadata behind, empty or of another release.
    """
    beside = [found for found in installed if Path(str(found.locate_file(""))) == folder.parent]
    stated = {_stated_version(found) for found in beside or installed[:1]} - {""}  # elsewhere: an editable install
    return stated.pop() if len(stated) == 1 else UNKNOWN


def _stated_version(installed: Distribution) -> str:
    """Empty where the metadata cannot be read: Python's own answer is then None or an exception, by its version."""
    with suppress(KeyError, TypeError, OSError, PackageNotFoundError):
        return str(installed.metadata["Version"] or "")
    return ""


def digest_library(folder: Path) -> str:
    """SHA-256 over a package's compiled files, or over its Python sources where it has none, in path order.

    Each file enters by its path in the package, its size and its bytes; where the package lies does not matter.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.so")) or sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


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
    lines = _PROCESSORS.read_text(errors="replace").splitlines() if _PROCESSORS.is_file() else []
    return Environment(
        sku=CPU,
        sm_count=torch.get_num_threads(),
        shared_memory_optin_bytes=0,
        driver=processor_name(lines),
        cuda=torch.version.cuda or "",
        torch=str(torch.__version__),
        triton=_triton_version(),
        libraries=(),
    )


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


def _module_folder(module: str) -> Path | None:
    """Where a top-level package lies, without importing it; None if there is no such package.

    A folder without ``__init__.py``, as an uninstall leaves it where something was cached, is none.
    """
    spec = find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec and spec.origin else []
    return Path(folders[0]) if folders else None


def _missing(package: str, error: ImportError) -> MissingPackageError:
    return MissingPackageError(
        f'detecting the environment needs {package}: {error}; install it with: pip install "mla-tune[tune]"'
    )
