"""A driver for tests: a real shared library, compiled from ``driver_stand_in.c``, that says which GPUs there are."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@dataclass(frozen=True)
class Gpu:
    """One device, as the driver tells it; an H200 unless told otherwise."""

    name: str = "NVIDIA H200"
    uuid: str = "GPU-aaaa2222-0000-4000-8000-000000000000"
    cores: int = 16896
    major: int = 9
    minor: int = 0
    mig: int = 0
    mib: int = 143771
    watts: int = 700
    mode: int = 0
    """0 for a GPU of this machine's own, 2 for one that a hypervisor shares."""

    def __str__(self) -> str:
        fields = (self.name, self.uuid, self.cores, self.major, self.minor, self.mig, self.mib, self.watts, self.mode)
        return "|".join(map(str, fields))


H200 = Gpu()
H200_NVL = Gpu("NVIDIA H200 NVL", "GPU-cccc3333-0000-4000-8000-000000000000", watts=600)
H100 = Gpu("NVIDIA H100 80GB HBM3", "GPU-dddd4444-0000-4000-8000-000000000000", mib=81559)
H20 = Gpu("NVIDIA H20", "GPU-bbbb1111-0000-4000-8000-000000000000", 9984, mib=97871, watts=500)


@lru_cache(maxsize=2)
def _folder(cores: bool) -> TemporaryDirectory[str]:
    """Lasts as long as this process."""
    return TemporaryDirectory(prefix="driver-stand-in-")


@lru_cache(maxsize=2)
def library_folder(cores: bool = True) -> Path:
    """A folder with ``libnvidia-ml.so.1``; without ``cores`` it lacks nvmlDeviceGetNumGpuCores."""
    folder = Path(_folder(cores).name)
    flags = [] if cores else ["-DWITHOUT_CORES"]
    source = Path(__file__).with_suffix(".c")
    command = [
        "gcc",
        *flags,
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-o",
        str(folder / "libnvidia-ml.so.1"),
        str(source),
    ]
    subprocess.run(command, check=True)
    return folder


def variables(*gpus: Gpu, fails: str = "", cores: bool = True) -> dict[str, str]:
    """What a process must have in its environment to see these GPUs; ``fails`` is ``function=code,...``."""
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(
            filter(None, [str(library_folder(cores)), os.environ.get("LD_LIBRARY_PATH")])
        ),
        "STAND_IN_GPUS": ";".join(map(str, gpus)),
        "STAND_IN_FAILS": fails,
    }


def install(patch: pytest.MonkeyPatch, *gpus: Gpu, fails: str = "", cores: bool = True) -> None:
    """Let this process see these GPUs and no others, through CUDA's default variables."""
    patch.setattr("mla_tune.hardware.driver.LIBRARY", str(library_folder(cores) / "libnvidia-ml.so.1"))
    patch.setattr("mla_tune.notice._said", set())
    for name, value in variables(*gpus, fails=fails, cores=cores).items():
        if name.startswith("STAND_IN"):
            patch.setenv(name, value)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        patch.delenv(name, raising=False)
