"""Which device a command means, and where its files are: in the user's folder, unless a command line names others.

Neither the current folder nor an installed package is written to. In a checkout ``MLA_TUNE_HOME=.`` makes it the user's
folder, so that what is committed is made anew.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from mla_tune.errors import EnvironmentMismatchError, MlaTuneError
from mla_tune.hardware.nvml import GpuIdentity, detect_gpu
from mla_tune.hardware.sku import CPU, resolve_sku
from mla_tune.policy.search import HOME_VARIABLE, checkout, policy_name, user_home, user_policies
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
    """The SKU whose files ``--gpu argument`` names, which need not be in this machine; ``auto`` is the one that is."""
    if argument != "auto":
        return resolve_sku(argument)
    gpu = detect_gpu()
    return gpu.sku if gpu else CPU


def database_path(sku: str) -> Path:
    """The working database of a SKU, in the user's folder."""
    return user_home() / "db" / f"{sku}.db"


def export_path(sku: str, provider: str = OWN) -> Path:
    """The export of a SKU's measurements, in the user's folder; another file for an engine's kernels."""
    return user_home() / "db" / _export_name(sku, provider)


def readable_export(sku: str, provider: str = OWN) -> Path:
    """The export to read where none is named: the user's, else the checkout's."""
    own, source = export_path(sku, provider), checkout()
    if own.is_file() or source is None:
        return own
    committed = source / "db" / _export_name(sku, provider)
    return committed if committed.is_file() else own


def policy_path(sku: str, provider: str = OWN, overlap: int = 0) -> Path:
    """The policy of a SKU, in the user's folder; other files for an engine's kernels and for overlapping selections."""
    path = user_policies() / policy_name(sku, provider)
    return path.with_name(f"{path.stem}.overlap-{overlap}.yaml") if overlap else path


def _export_name(sku: str, provider: str) -> str:
    return f"{Path(policy_name(sku, provider)).stem}.jsonl"


def validation_path(sku: str) -> Path:
    """The database of a SKU's validations, in the user's folder: no fit reads it."""
    return user_home() / "db" / f"{sku}.validate.db"


def make_folder(path: Path) -> None:
    """Make the folder that ``path`` will be written to. Raises :class:`MlaTuneError` where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))
    except OSError as error:
        raise MlaTuneError(
            f"{path} must lie in a folder that exists or can be made: {error.filename}: {error.strerror}; "
            f"name another, or another user's folder in {HOME_VARIABLE}"
        ) from None
