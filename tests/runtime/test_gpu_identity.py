"""Which GPU a process uses. Without a driver the answer is None; a driver that does not tell is an error, never None."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mla_tune.errors import EnvironmentMismatchError
from mla_tune.hardware.nvml import GpuIdentity, detect_gpu, sm_count, visible_device
from mla_tune.runtime.dispatcher import Dispatcher
from tests.command import run
from tests.driver_stand_in import H20, H100, H200, H200_NVL, Gpu, install, variables


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
        ("GPU-4a5b,1", 1, None),
        ("1,GPU-4a5b", 1, None),
        ("0,0", 0, None),
        ("GPU-4a5b,GPU-4a5b", 0, None),
        ("1x,2", 0, 1),
        ("+1", 0, 1),
        ("1-2", 0, 1),
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
    monkeypatch.setattr("mla_tune.hardware.driver.LIBRARY", "libnvidia-ml.so.does-not-exist")
    monkeypatch.setattr("mla_tune.hardware.driver.CONTROL_DEVICE", Path("/dev/does-not-exist"))
    with pytest.raises(OSError, match="does-not-exist"):
        ctypes.CDLL("libnvidia-ml.so.does-not-exist")
    assert detect_gpu() is None


def refused() -> str:
    """The one line with which this process's GPU is refused."""
    with pytest.raises(EnvironmentMismatchError) as caught:
        detect_gpu()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def serving(*gpus: Gpu, fails: str = "", cores: bool = True, **more: str) -> tuple[str, str]:
    """Evidence and source of what a fresh process is served, and everything that it said beside that must be one-liners."""
    code = (
        "from mla_tune.runtime import Dispatcher; found = Dispatcher.for_this_gpu(fallback='incumbent'); "
        "print(found.evidence, found.policy.gpu.sku if found.policy else found.source)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), **variables(*gpus, fails=fails, cores=cores), **more},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr
    evidence, _, source = done.stdout.strip().partition(" ")
    return evidence, source


def test_the_driver_tells_product_memory_power_limit_and_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, H200)
    assert detect_gpu() == GpuIdentity("NVIDIA H200", "nvidia-h200", 132, "580.159.04", H200.uuid, 140, 700)


def test_a_box_of_equal_gpus_is_numbered_as_cuda_does(monkeypatch: pytest.MonkeyPatch) -> None:
    boxed = [Gpu(uuid=f"GPU-{number}{H200.uuid[5:]}") for number in range(4)]
    install(monkeypatch, *boxed)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    assert [gpu.uuid for index in range(2) if (gpu := detect_gpu(index))] == [boxed[2].uuid, boxed[1].uuid]
    assert detect_gpu(2) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,1")
    assert detect_gpu() is None


@pytest.mark.parametrize("visible", [None, "0", "1"])
def test_in_a_box_of_several_models_a_number_says_nothing_unless_cuda_counts_in_the_drivers_order(
    visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, H20, H200)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    line = refused()
    assert "got NVIDIA H20, NVIDIA H200" in line
    assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID" in line
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    gpu = detect_gpu()
    assert gpu is not None
    assert gpu.sku == ("nvidia-h200" if visible == "1" else "nvidia-h20")


@pytest.mark.parametrize("order", ["FASTEST_FIRST", "PCI_BUS_ID"])
def test_a_uuid_names_its_gpu_in_any_box(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, H20, H200)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    for gpu in (H20, H200):
        for uuid in (gpu.uuid, gpu.uuid[:12]):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", uuid)
            found = detect_gpu()
            assert found is not None
            assert (found.product, found.uuid) == (gpu.name, gpu.uuid)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-")  # of both
    assert detect_gpu() is None


def test_the_gpu_is_the_one_that_torch_computes_on_whatever_the_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, H20, H200)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    properties = {0: SimpleNamespace(uuid=H20.uuid.removeprefix("GPU-")), 1: SimpleNamespace(uuid=H200.uuid)}
    torch, current = ModuleType("torch"), 0
    torch.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        is_initialized=lambda: True, current_device=lambda: current, get_device_properties=properties.__getitem__
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    for current, gpu in enumerate((H20, H200)):
        found = detect_gpu()
        assert found is not None
        assert (found.product, current) == (gpu.name, current)
    properties[1].uuid = "ffffffff-0000-4000-8000-000000000000"  # a slice has a UUID of its own
    assert "a GPU must be whole" in refused()


@pytest.mark.parametrize("visible", [None, "0", H200.uuid, "MIG-1f2e"])
@pytest.mark.parametrize("gpus", [(Gpu(mig=1),), (H20, Gpu(mig=1)), (Gpu(mig=1), H20)])
def test_a_mig_slice_is_refused_however_it_is_seen(
    gpus: tuple[Gpu, ...], visible: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, *gpus)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "MIG" in refused()


def test_a_process_that_sees_the_parent_of_mig_slices_is_not_served_the_whole_gpus_policy() -> None:
    assert serving(H200) == ("measured", "nvidia-h200")
    evidence, source = serving(Gpu(mig=1), CUDA_VISIBLE_DEVICES="0")
    assert (evidence, "NVIDIA H200 in MIG mode" in source) == ("none", True)


@pytest.mark.parametrize(
    ("gpu", "sku"),
    [
        (H200_NVL, "nvidia-h200-nvl"),
        (Gpu("NVIDIA H200-71C"), "nvidia-h200-71c"),
        (Gpu(mode=2), "nvidia-h200-vgpu"),
        (Gpu(mib=71885), "nvidia-h200-70gib"),
        (Gpu("NVIDIA GH200 480GB", mib=97871), "nvidia-gh200-480gb"),
    ],
    ids=str,
)
def test_another_product_of_the_chip_has_a_name_of_its_own_and_no_policy_of_a_known_one(gpu: Gpu, sku: str) -> None:
    evidence, source = serving(gpu)
    assert evidence == "none"
    assert f"none is for {sku}," in source


@pytest.mark.parametrize("cores", [True, False])
def test_a_driver_that_lacks_a_reading_is_one_line_and_the_rest_is_told(
    cores: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optional = "nvmlDeviceGetMemoryInfo=3,nvmlDeviceGetEnforcedPowerLimit=3,nvmlSystemGetDriverVersion=999"
    install(monkeypatch, H100, fails=optional, cores=cores)
    with caplog.at_level(logging.WARNING, "mla_tune"):
        found = [detect_gpu() for _ in range(3)]
    assert found == [GpuIdentity("NVIDIA H100 80GB HBM3", "nvidia-h100", 132, "", H100.uuid)] * 3
    (line,) = caplog.messages
    assert "memory (nvmlDeviceGetMemoryInfo: Not Supported (error 3)), power limit (" in line
    assert ("SM count (the library has no nvmlDeviceGetNumGpuCores)" in line) is not cores


def test_what_a_gpu_does_not_have_is_no_missing_reading(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, H200, fails="nvmlDeviceGetMigMode=3,nvmlDeviceGetVirtualizationMode=3")
    assert detect_gpu() is not None
    assert caplog.messages == []


@pytest.mark.parametrize(
    "function", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetName"]
)
def test_a_driver_that_refuses_is_one_line_and_never_no_gpu(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, H200, fails=f"{function}=15")
    assert f"{function}: GPU is lost (error 15)" in refused()


def test_a_library_that_does_not_load_where_a_gpu_was_passed_in_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("mla_tune.hardware.driver.LIBRARY", "libnvidia-ml.so.does-not-exist")
    monkeypatch.setattr("mla_tune.hardware.driver.CONTROL_DEVICE", tmp_path)
    assert "does-not-exist cannot be loaded" in refused()
    broken = tmp_path / "libnvidia-ml.so.1"
    broken.write_bytes(b"\x7fELF")
    monkeypatch.setattr("mla_tune.hardware.driver.LIBRARY", str(broken))
    monkeypatch.setattr("mla_tune.hardware.driver.CONTROL_DEVICE", tmp_path / "none")
    assert "libnvidia-ml.so.1 cannot be loaded" in refused()


def test_a_policy_that_the_user_names_serves_where_the_driver_refuses_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, H200, fails="nvmlInit_v2=15")
    named = Path(__file__).parents[2] / "policies" / "nvidia-h200.yaml"
    monkeypatch.setenv("MLA_TUNE_POLICY", str(named))
    dispatcher = Dispatcher.for_this_gpu()
    assert dispatcher.evidence == "measured"
    assert "GPU is lost" in dispatcher.differences[0]


@pytest.mark.parametrize("fails", ["", "nvmlInit_v2=15"])
def test_commands_take_an_old_or_dead_driver_in_one_line(fails: str, tmp_path: Path) -> None:
    a100 = Gpu("NVIDIA A100-SXM4-80GB", cores=6912, major=8, mib=81920)
    told = variables(a100, fails=fails, cores=False)
    for arguments, status in ((("sweep", "--gpu", "cpu", "--dry-run"), 0), (("sweep", "--dry-run"), 1)):
        done = run(tmp_path, *arguments, **told)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
    assert "the driver does not tell" in done.stderr or "driver must say" in done.stderr
    assert "no NVIDIA GPU" not in done.stderr
