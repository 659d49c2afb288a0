"""Which GPU a process sees. Without a driver the answer is None, not an error."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from mla_tune.hardware.nvml import detect_gpu, sm_count, visible_device


@pytest.mark.parametrize(
    ("variable", "index", "device"),
    [
        (None, 0, 0),
        (None, 3, 3),
        ("", 0, None),
        ("-1", 0, None),
        ("NoDevFiles", 0, None),
        ("2,5", 0, 2),
        (" 2 , 5 ", 1, 5),
        ("2,5", 2, None),
        ("0,-1,1", 1, None),
        ("GPU-4a5b,1", 0, "GPU-4a5b"),
        ("MIG-1f2e", 0, "MIG-1f2e"),
        ("²", 0, None),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    variable: str | None, index: int, device: int | str | None
) -> None:
    assert visible_device(variable, index) == device


@pytest.mark.parametrize(
    ("cores", "capability", "sms"),
    [
        (6912, (8, 0), 108),
        (10752, (8, 6), 84),
        (18176, (8, 9), 142),
        (16896, (9, 0), 132),
        (9984, (9, 0), 78),
        (18944, (10, 0), 148),
        (24064, (12, 0), 188),
    ],
    ids=["A100", "A40", "L40S", "H200", "H20", "B200", "RTX PRO 6000"],
)
def test_multiprocessors_follow_from_cores_and_architecture(cores: int, capability: tuple[int, int], sms: int) -> None:
    assert sm_count(cores, capability) == sms


def test_no_visible_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_gpu() is None


def test_no_driver_or_no_such_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert detect_gpu(index=4096) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-ffffffff-0000")
    assert detect_gpu() is None


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
def test_the_gpu_is_the_one_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu = detect_gpu()
    assert gpu is not None
    device = torch.cuda.get_device_properties(0)
    assert (gpu.product, gpu.sm_count) == (device.name, device.multi_processor_count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"GPU-{str(device.uuid)[:8]}")
    assert detect_gpu() == gpu


def test_a_library_that_is_no_driver_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("mla_tune.hardware.nvml._LIBRARY", "libnvidia-ml.so.does-not-exist")
    with pytest.raises(OSError, match="does-not-exist"):
        ctypes.CDLL("libnvidia-ml.so.does-not-exist")
    assert detect_gpu() is None
