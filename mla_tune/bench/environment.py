"""The fingerprint of this machine: what a measurement depends on besides the shape, read off as an :class:`Environment`.

Nothing is imported that could touch the GPU except torch itself: a kernel library is identified by its metadata and by
a digest over its files, since two builds may carry one version.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mla_tune.errors import EnvironmentMismatchError, MissingPackageError
from mla_tune.hardware.builds import DISTRIBUTIONS, UNKNOWN
from mla_tune.hardware.sku import CPU, Environment, KernelLibrary, sku_name

if TYPE_CHECKING:
    from types import ModuleType

_CHUNK_BYTES = 1 << 20
_PROCESSORS = Path("/proc/cpuinfo")


def detect_environment(gpu: bool) -> Environment:
    """What runs here: the GPU that torch calls current and its kernel libraries, or the processor.

    Raises :class:`MissingPackageError` without torch (or, for a GPU, nvidia-ml-py), and
    :class:`EnvironmentMismatchError` where a GPU is wanted and torch can use none.
    """
    return _gpu_environment() if gpu else _cpu_environment()


def kernel_libraries() -> tuple[KernelLibrary, ...]:
    """The kernel libraries that could be imported here, sorted by name; none of them is imported.

    A library without metadata (a source tree on the path) goes by its project's name and the version :data:`UNKNOWN`.
    """
    found = []
    for module, distributions in DISTRIBUTIONS.items():
        folder = _module_folder(module)
        if folder is None:
            continue
        installed = [(name, version(name)) for name in distributions if _is_installed(name)]
        sha256 = digest_library(folder)
        found += [KernelLibrary(n, v, sha256) for n, v in installed or [(distributions[-1], UNKNOWN)]]
    return tuple(sorted(found, key=lambda library: library.name))


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
    return Environment(
        sku=sku_name(device.name),
        sm_count=device.multi_processor_count,
        shared_memory_optin_bytes=device.shared_memory_per_block_optin,
        driver=_driver_version(),
        cuda=torch.version.cuda or "",
        torch=str(torch.__version__),
        triton=_triton_version(),
        libraries=kernel_libraries(),
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
    try:
        import pynvml
    except ImportError as error:
        raise _missing("nvidia-ml-py", error) from None
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise EnvironmentMismatchError(
            f"the driver's version must be readable: its management library said {error}; accepted: a machine or "
            "container where `nvidia-smi` works (containers: driver capability 'utility')"
        ) from None
    # Releases before 11.5 return bytes, and other distributions of this module still do.
    return driver.decode() if isinstance(driver, bytes) else str(driver)


def _triton_version() -> str:
    """Empty where Triton is absent: a CPU build of torch does not bring it."""
    for name in ("triton", "pytorch-triton"):
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


def _module_folder(module: str) -> Path | None:
    """Where a top-level package lies, without importing it; None if there is no such package."""
    spec = find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(folders[0]) if folders else None


def _is_installed(distribution: str) -> bool:
    with suppress(PackageNotFoundError):
        version(distribution)
        return True
    return False


def _missing(package: str, error: ImportError) -> MissingPackageError:
    return MissingPackageError(
        f'detecting the environment needs {package}: {error}; install it with: pip install "mla-tune[tune]"'
    )
