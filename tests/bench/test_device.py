"""The fingerprint of a machine: stable, sensitive to every byte of a kernel library, and honest about what is absent."""

import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.bench.environment import (
    detect_environment,
    kernel_libraries,
    processor_name,
)
from mla_tune.errors import EnvironmentMismatchError, MissingPackageError
from mla_tune.hardware.digests import digest_library
from mla_tune.hardware.sku import sku_name
from mla_tune.store.database import Database
from mla_tune.store.export import read_export, write_export
from tests.driver_stand_in import H200, H200_NVL, Gpu
from tests.driver_stand_in import install as install_driver
from tests.store.strategies import ENVIRONMENT, timing

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
trees = st.dictionaries(st.sampled_from(("a.so", "b.so", "sub/a.so", "sub/c.so")), st.binary(max_size=64), min_size=1)


def lay_out(root: Path, tree: dict[str, bytes]) -> Path:
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def digest(tree: dict[str, bytes]) -> str:
    with TemporaryDirectory() as folder:
        return digest_library(lay_out(Path(folder), tree))


def install(site: Path, module: str, distribution: str = "", version: str = "", compiled: bytes = b"\x7fELF") -> None:
    """A library as pip lays it out, whose import fails."""
    tree = {f"{module}/__init__.py": b"raise RuntimeError('imported')", f"{module}/cuda.abi3.so": compiled}
    if distribution:
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        tree[f"{distribution.replace('-', '_')}-{version}.dist-info/METADATA"] = metadata.encode()
    lay_out(site, tree)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only folder of installed packages, so that what this machine really has plays no part."""
    others = [p for p in sys.path if not p.endswith("-packages") and not Path(p, "flash_mla").is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    for module in ("flash_mla", "deep_gemm"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield tmp_path
    assert not {"flash_mla", "deep_gemm"} & sys.modules.keys(), "a kernel library was imported"


def test_the_cpu_environment_names_the_processor_and_the_threads_and_has_no_kernel_libraries(site: Path) -> None:
    install(site, "flash_mla", "sgl-flash-mla", "1.0.0")
    environment = detect_environment(gpu=False)
    assert environment.sku == "cpu"
    assert environment.sm_count == torch.get_num_threads()
    assert environment.shared_memory_optin_bytes == 0
    assert environment.driver
    assert environment.cuda == (torch.version.cuda or "")
    assert environment.torch == torch.__version__
    assert environment.libraries == ()


def torch_on(gpu: Gpu) -> SimpleNamespace:
    """``torch.cuda`` in a process that computes on ``gpu``."""
    device = SimpleNamespace(
        name=gpu.name, uuid=gpu.uuid, multi_processor_count=132, shared_memory_per_block_optin=232448
    )
    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        current_device=lambda: 0,
        get_device_properties=lambda index: device,
    )


@pytest.mark.parametrize(
    "products", [(H200, H200_NVL), (H200, Gpu(watts=500)), (H200, Gpu(mode=2)), (H200, Gpu(mib=71885))]
)
def test_two_products_of_one_chip_and_sm_count_are_two_environments(
    products: tuple[Gpu, Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for gpu in products:
        install_driver(monkeypatch, gpu)
        monkeypatch.setattr(torch, "cuda", torch_on(gpu))
        environment = detect_environment(gpu=True)
        assert (environment.product, environment.power_limit_w) == (gpu.name, gpu.watts)
        assert (environment.memory_gib, environment.driver) == (round(gpu.mib / 1024), "580.159.04")
        found.append(environment)
    assert found[0].id != found[1].id


def test_a_driver_version_that_nobody_tells_costs_that_reading_only(monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, H200, fails="nvmlSystemGetDriverVersion=999")
    monkeypatch.setattr(torch, "cuda", torch_on(H200))
    environment = detect_environment(gpu=True)
    assert (environment.sku, environment.driver, environment.power_limit_w) == ("nvidia-h200", "unknown", 700)


def test_detecting_the_same_machine_twice_gives_the_same_id() -> None:
    assert detect_environment(gpu=False).id == detect_environment(gpu=False).id


@without_gpu
def test_a_gpu_environment_without_a_gpu_is_one_line_that_says_what_to_do() -> None:
    with pytest.raises(EnvironmentMismatchError, match="--gpu cpu") as caught:
        detect_environment(gpu=True)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpu_environment_is_that_of_the_product_torch_sees() -> None:
    environment = detect_environment(gpu=True)
    assert environment.sku == sku_name(torch.cuda.get_device_name())
    assert environment.sm_count > 0
    assert environment.shared_memory_optin_bytes >= 48 * 1024
    assert environment.driver.split(".")[0].isdigit()
    assert environment.cuda == torch.version.cuda


@pytest.mark.parametrize("gpu", [False, True])
def test_without_torch_the_error_names_the_extra_that_brings_it(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingPackageError, match=r'needs torch.*pip install "mla-tune\[tune\]"'):
        detect_environment(gpu)


def test_installed_kernel_libraries_are_listed_by_name_with_version_and_digest_but_never_imported(site: Path) -> None:
    install(site, "flash_mla", "sgl-flash-mla", "1.0.0")
    install(site, "deep_gemm", "sgl-deep-gemm", "0.1.2", compiled=b"other")
    deep_gemm, flash_mla = kernel_libraries()
    assert (deep_gemm.name, deep_gemm.version) == ("sgl-deep-gemm", "0.1.2")
    assert (flash_mla.name, flash_mla.version) == ("sgl-flash-mla", "1.0.0")
    assert flash_mla.sha256 == digest_library(site / "flash_mla")
    assert deep_gemm.sha256 != flash_mla.sha256


def test_two_builds_of_one_version_are_told_apart(site: Path) -> None:
    install(site, "flash_mla", "flash-mla", "1.0.0", compiled=b"a build")
    (before,) = kernel_libraries()
    install(site, "flash_mla", "flash-mla", "1.0.0", compiled=b"another")
    (after,) = kernel_libraries()
    assert (before.name, before.version) == (after.name, after.version)
    assert before.sha256 != after.sha256


def test_a_library_without_metadata_is_listed_under_its_projects_name(site: Path) -> None:
    install(site, "deep_gemm")
    (library,) = kernel_libraries()
    assert (library.name, library.version) == ("deep-gemm", "unknown")


def left_behind(site: Path, name: str, version: str, stated: str | None) -> None:
    """A folder of metadata as an upgrade that broke off leaves it: empty, or of another release."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    if stated is not None:
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n{stated}")


@pytest.mark.parametrize(
    "stated", [None, "", "Version: \n", "Version: 0.9.0\n"], ids=["no file", "no version", "empty", "2nd"]
)
def test_a_version_that_nobody_can_tell_is_said_before_anything_is_measured(
    stated: str | None, site: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mla_tune.notice._said", set())
    install(site, "flash_mla", *(("sgl-flash-mla", "1.0.0") if stated and "0.9" in stated else ()))
    left_behind(site, "sgl-flash-mla", "0.9.0", stated)
    for _ in range(2):
        (library,) = kernel_libraries()
        assert (library.name, library.version) == ("sgl-flash-mla", "unknown")
    (line,) = caplog.messages
    assert line.startswith(f"sgl-flash-mla in {site / 'flash_mla'} must have one readable version")
    with Database.open(site / "a.db") as database:  # and storing and exporting it works
        environment = replace(ENVIRONMENT, libraries=(library,))
        database.record(environment, [timing()])
        write_export(site / "a.jsonl", environment, database.measurements(environment.id))
    assert read_export(site / "a.jsonl").environment == environment


def test_an_unreadable_folder_beside_the_right_metadata_changes_nothing(
    site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "flash_mla", "sgl-flash-mla", "1.0.0")
    left_behind(site, "sgl-flash-mla", "0.9.0", None)
    (library,) = kernel_libraries()
    assert (library.name, library.version) == ("sgl-flash-mla", "1.0.0")
    assert caplog.messages == []


def test_a_folder_that_an_uninstall_left_is_no_library(site: Path) -> None:
    (site / "flash_mla" / "__pycache__").mkdir(parents=True)
    assert kernel_libraries() == ()


def test_metadata_without_the_module_is_no_library(site: Path) -> None:
    install(site, "renamed", "sgl-flash-mla", "1.0.0")
    assert kernel_libraries() == ()


@settings(max_examples=40, deadline=None)
@given(one=trees, other=trees)
def test_digests_agree_exactly_where_paths_and_bytes_do(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert (digest(one) == digest(other)) == (one == other)
    assert digest(one) == digest(dict(reversed(one.items())))


def test_python_sources_count_only_where_nothing_is_compiled() -> None:
    assert digest({"a.py": b"1"}) != digest({"a.py": b"2"})
    assert digest({"a.py": b"1", "b.so": b"x"}) == digest({"a.py": b"2", "b.so": b"x"})


def test_bytes_cannot_move_from_one_file_to_the_next_unseen() -> None:
    assert digest({"a.so": b"xy", "b.so": b""}) != digest({"a.so": b"x", "b.so": b"y"})


def test_the_processor_is_the_first_model_name() -> None:
    lines = ["processor\t: 0", "model name\t: Some CPU @ 2.0: fast", "processor\t: 1", "model name\t: Another"]
    assert processor_name(lines) == "Some CPU @ 2.0: fast"


@pytest.mark.parametrize("lines", [[], ["processor : 0"], ["model name :"]])
def test_a_processor_without_a_model_name_falls_back_to_its_architecture(lines: list[str]) -> None:
    assert processor_name(lines) == (platform.processor() or platform.machine())
