"""Which device a command means, and where its files are."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from mla_tune.errors import EnvironmentMismatchError, MlaTuneError
from mla_tune.hardware.nvml import GpuIdentity, detect_gpu
from mla_tune.hardware.sku import CPU, resolve_sku
from mla_tune.sites.provider import OWN


@dataclass(frozen=True, slots=True)
class LocalDevice:
    """The device of this machine that a command will use."""

    sku: str
    kind: str
    """``cpu`` or ``cuda``."""
    sm_count: int
    """Streaming multiprocessors; 0 for the CPU, where the worker counts threads."""


def this_device(argument: str) -> LocalDevice:
    """The device that ``--gpu argument`` means on this machine: ``auto``, ``cpu`` or a SKU that must be here.

    Raises :class:`UsageError` for an unknown SKU, :class:`EnvironmentMismatchError` for one that is not in this machine.
    """
    sku = None if argument == "auto" else resolve_sku(argument)
    if sku == CPU:  # whatever the driver of a GPU has to say
        return LocalDevice(CPU, "cpu", 0)
    gpu = detect_gpu()
    if sku is None and gpu is None:
        return LocalDevice(CPU, "cpu", 0)
    if gpu is None or sku not in (None, gpu.sku):
        raise EnvironmentMismatchError(
            f"--gpu {argument} measures an {sku} that is in this machine: found {_found(gpu)}; accepted here: "
            f"{_accepted(gpu)}; run it on a machine with that GPU"
        )
    if not gpu.sm_count:
        raise EnvironmentMismatchError(
            f"a sweep is planned by the GPU's SM count: the driver does not tell that of {gpu.product}; accepted: a driver "
            "with nvmlDeviceGetNumGpuCores (495 and later); upgrade it, or pass --gpu cpu"
        )
    return LocalDevice(gpu.sku, "cuda", gpu.sm_count)


def _found(gpu: GpuIdentity | None) -> str:
    return f"{gpu.product} ({gpu.sm_count} SMs)" if gpu else "no NVIDIA GPU"


def _accepted(gpu: GpuIdentity | None) -> str:
    return ", ".join(["auto", *([gpu.sku.removeprefix("nvidia-")] if gpu else []), CPU])


def policy_sku(argument: str) -> str:
    """The SKU whose policy ``--gpu argument`` names, which need not be in this machine; ``auto`` is the one that is."""
    if argument != "auto":
        return resolve_sku(argument)
    gpu = detect_gpu()
    return gpu.sku if gpu else CPU


def database_path(sku: str) -> Path:
    """The working database of a SKU, below the current folder."""
    return Path("db") / f"{sku}.db"


def export_path(sku: str, provider: str = OWN) -> Path:
    """The committed export of a SKU's measurements, below the current folder; another file for an engine's kernels."""
    return Path("db") / f"{_named(sku, provider)}.jsonl"


def policy_path(sku: str, provider: str = OWN, overlap: int = 0) -> Path:
    """The policy of a SKU, below the current folder; other files for an engine's kernels and for overlapping selections."""
    assumed = f".overlap-{overlap}" if overlap else ""
    return Path("policies") / f"{_named(sku, provider)}{assumed}.yaml"


def _named(sku: str, provider: str) -> str:
    return sku if provider == OWN else f"{sku}.{provider.partition('@')[0]}"


def validation_path(sku: str) -> Path:
    """The database of a SKU's validations, below the current folder: no fit reads it."""
    return Path("db") / f"{sku}.validate.db"


def make_folder(path: Path) -> None:
    """Make the folder that ``path`` will be written to. Raises :class:`MlaTuneError` where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
    except OSError as error:
        raise MlaTuneError(
            f"{path} must lie in a folder that exists or can be made: {error.filename}: {error.strerror}; "
            "name another, or run from another folder"
        ) from None
