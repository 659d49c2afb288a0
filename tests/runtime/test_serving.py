"""Which file serves an engine, how many of its tables, and why not the others; asked with the builds that are laid out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla_tune.hardware.builds import installed_version
from mla_tune.hardware.digests import digest_library, known_digest
from mla_tune.hardware.nvml import GpuIdentity
from mla_tune.policy.codec import write_policy
from mla_tune.policy.schema import Library, Policy, Table
from mla_tune.policy.search import Place, policy_files, user_policies
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.runtime.serving import GpuKey, find_serving
from mla_tune.runtime.switches import Switches
from tests.policy.strategies import anywhere, full_policy, modelled_policy, policy, table

H200 = GpuKey("nvidia-h200", 132)
COMPILED = b"\x7fELF of a library"
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lay a distribution out on the path: its metadata, and the package that it brings, if any."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def laid_out(name: str, version: str | None, module: str = "", requires: tuple[str, ...] = ()) -> Path:
        if module:
            (site / module).mkdir(exist_ok=True)
            (site / module / "__init__.py").touch()
            (site / module / "kernels.so").write_bytes(COMPILED)
        metadata = site / f"{name.replace('-', '_')}-{version or 'x'}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        stated = [] if version is None else [f"Name: {name}", f"Version: {version}"]
        metadata.write_text(
            "\n".join(["Metadata-Version: 2.1", *stated, *(f"Requires-Dist: {r}" for r in requires), ""])
        )
        sys.path_importer_cache.clear()
        return site

    return laid_out


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the shipped policies, empty; the user's is empty too."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr("mla_tune.policy.search._shipped_files", lambda: sorted(folder.glob("*.yaml")))
    monkeypatch.setenv("MLA_TUNE_HOME", str(tmp_path / "home"))
    return folder


def reasons(gpu: GpuKey, engine: str = "own") -> list[str]:
    """Why tables, or candidates of them, are left out."""
    return [group.reason for group in find_serving(gpu, engine).left_out]


def undigested(*tables: Table, **changes: Any) -> Policy:
    """A policy of ``tables`` without a record of what the libraries' files were."""
    found = policy(*tables, **changes)
    return msgspec.structs.replace(found, environment=msgspec.structs.replace(found.environment, libraries=()))


def flash_mla(*, sha256: str = "") -> Policy:
    """A policy whose attention depends on FlashMLA, whose schedule only in one candidate on DeepGEMM."""
    whole = full_policy()
    library = Library(name="sgl-flash-mla", version="1.0.0", sha256=sha256)
    environment = msgspec.structs.replace(whole.environment, libraries=(library,))
    return msgspec.structs.replace(whole, environment=environment)


def test_deep_gemms_release_is_no_matter_for_attention(shipped: Path, install: Install) -> None:
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    install("sgl-deep-gemm", "0.2.3.post2", "deep_gemm")
    write_policy(shipped / "nvidia-h200.yaml", flash_mla())
    found = find_serving(H200)
    assert len(found.tables) == found.total == len(full_policy().tables)
    (left,) = found.left_out
    assert (left.candidate, left.reason) == ("deep_gemm", "sgl-deep-gemm must be 0.1.2: got 0.2.3.post2")
    schedules = [of for of in found.tables if of.site == "indexer_metadata"]
    assert {of.candidates for of in schedules} == {("jit",)}
    assert not any(of.candidate_builds for of in schedules)


@pytest.mark.parametrize(
    ("version", "module", "reason"),
    [
        ("1.0.1", "flash_mla", "sgl-flash-mla must be 1.0.0: got 1.0.1"),
        (None, "flash_mla", "sgl-flash-mla must be 1.0.0: got unknown"),
        ("1.0.0", "", "sgl-flash-mla must be 1.0.0: its package flash_mla is not there"),
    ],
)
def test_another_an_unknown_or_a_missing_build_leaves_out_what_depends_on_it_alone(
    version: str | None, module: str, reason: str, shipped: Path, install: Install
) -> None:
    install("sgl-flash-mla", version, module)
    write_policy(shipped / "nvidia-h200.yaml", flash_mla())
    found = find_serving(H200)
    assert {of.site for of in found.tables} == {"indexer_metadata"}
    assert [group.reason for group in found.left_out if group.candidate is None] == [reason]
    assert f"6 of {found.total} tables serve own; 34 (prefill_attention of" in found.summary
    assert reason in found.summary


def test_without_any_library_no_attention_serves(shipped: Path, install: Install) -> None:
    write_policy(shipped / "nvidia-h200.yaml", flash_mla())
    assert "sgl-flash-mla must be 1.0.0: it is not installed" in reasons(H200)


def test_a_fork_over_its_upstream_is_another_build(shipped: Path, install: Install) -> None:
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    install("flash-mla", "1.0.0")
    write_policy(shipped / "nvidia-h200.yaml", flash_mla())
    assert "sgl-flash-mla must be 1.0.0: flash-mla is installed over it" in reasons(H200)


def test_an_upgrade_that_broke_off_leaves_an_unknown_version(install: Install) -> None:
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    assert installed_version("sgl-flash-mla") == "1.0.0"
    install("sgl-flash-mla", "1.0.1")
    assert installed_version("sgl-flash-mla") == "unknown"


@pytest.mark.parametrize("release", ["0.5.22", "0.6.7"])
def test_another_release_of_the_provider_serves_nothing_that_depends_on_it(
    release: str, shipped: Path, install: Install
) -> None:
    install("sglang", release, requires=("sgl-flash-mla==1.0.0",))
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    provided = table(builds=("sgl-flash-mla==1.0.0", "sglang==0.5.23"))
    write_policy(shipped / "nvidia-h200.sglang.yaml", undigested(provided, provider="sglang@0.5.23"))
    assert reasons(H200, "sglang") == [f"sglang must be 0.5.23: got {release}"]


def test_an_sglang_that_has_flash_mla_in_sglang_kernel_does_not_run_the_other(shipped: Path, install: Install) -> None:
    install("sglang", "0.5.22", requires=("sglang-kernel==0.4.9", "torch==2.14.1"))
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    write_policy(shipped / "nvidia-h200.yaml", undigested())
    assert reasons(H200, "sglang") == [
        "sgl-flash-mla must be 1.0.0: this SGLang runs the flash_mla in sglang-kernel, which "
        "`mla-tune ensure --engine sglang` measures"
    ]
    assert reasons(H200, "own") == []


def test_vllm_is_served_by_what_was_measured_with_its_wheel_and_by_nothing_else(
    shipped: Path, install: Install
) -> None:
    install("vllm", "0.33.0")
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    write_policy(shipped / "nvidia-h200.yaml", policy())
    assert reasons(H200, "vllm") == ["sgl-flash-mla must be 1.0.0: vLLM runs the flash_mla of its own wheel"]
    (Path(sys.path[0]) / "vllm").mkdir()
    (Path(sys.path[0]) / "vllm" / "__init__.py").touch()
    write_policy(shipped / "nvidia-h200.vllm.yaml", policy(table(builds=("vllm==0.33.0",))))
    assert find_serving(H200, "vllm").complete
    write_policy(shipped / "nvidia-h200.vllm.yaml", policy(table(builds=("vllm==0.32.0",))))
    assert reasons(H200, "vllm") == ["vllm must be 0.32.0: got 0.33.0"]


def test_a_recorded_digest_is_compared(shipped: Path, install: Install) -> None:
    site = install("sgl-flash-mla", "1.0.0", "flash_mla")
    measured = digest_library(site / "flash_mla")
    write_policy(shipped / "nvidia-h200.yaml", flash_mla(sha256=measured))
    assert len(find_serving(H200).tables) == len(full_policy().tables)
    (site / "flash_mla" / "kernels.so").write_bytes(COMPILED + b", built again")
    rebuilt = digest_library(site / "flash_mla")
    assert reasons(H200)[0] == (
        f"sgl-flash-mla 1.0.0 must be the measured build {measured[:12]}: its files are {rebuilt[:12]}"
    )


def test_a_digest_is_read_once_and_again_where_a_file_changes(tmp_path: Path) -> None:
    folder, cache = tmp_path / "flash_mla", tmp_path / "cache" / "digests.json"
    folder.mkdir()
    library = folder / "kernels.so"
    library.write_bytes(COMPILED)
    first = known_digest(folder, cache)
    assert first == digest_library(folder)
    assert str(folder) in cache.read_text()
    cache.write_text(cache.read_text().replace(first, "0" * 64))
    assert known_digest(folder, cache) == "0" * 64  # from the cache: the file was not read
    library.write_bytes(COMPILED[::-1])
    assert known_digest(folder, cache) == digest_library(folder) != first
    for nonsense in ("", "[]", '{"x": 1}', f'{{"{folder}": {{"files": [[3]], "sha256": 1}}}}', "{"):
        cache.write_text(nonsense)
        assert known_digest(folder, cache) == digest_library(folder)
    assert known_digest(folder, Path("/proc/nowhere/digests.json")) == digest_library(folder)


def test_a_modelled_policy_and_another_gpu_say_so_with_the_count(shipped: Path) -> None:
    write_policy(shipped / "nvidia-b200.yaml", anywhere(modelled_policy()))
    found = find_serving(GpuKey("nvidia-b200"))
    assert (len(found.tables), found.total) == (0, 1)
    assert "0 of 1 tables serve own; it is modelled, and must be measured" in found.summary
    assert find_serving(GpuKey("nvidia-b200"), switches=Switches(allow_modelled=True)).complete
    assert "the GPU must be nvidia-b200 with 148 SMs: got nvidia-b200 with 160 SMs" in (
        find_serving(GpuKey("nvidia-b200", 160), switches=Switches(allow_modelled=True)).summary
    )


def test_the_users_folder_comes_before_what_ships_and_a_named_file_before_both(shipped: Path, tmp_path: Path) -> None:
    everywhere = anywhere(policy())
    for place in (shipped, tmp_path / "home" / "policies"):
        place.mkdir(parents=True, exist_ok=True)
        for name in ("nvidia-h200.yaml", "nvidia-h200.sglang.yaml"):
            write_policy(place / name, everywhere)
    order = [(file.place, Path(str(file)).name) for file in policy_files("nvidia-h200", "sglang")]
    assert order == [
        (Place.USER, "nvidia-h200.sglang.yaml"),
        (Place.USER, "nvidia-h200.yaml"),
        (Place.SHIPPED, "nvidia-h200.sglang.yaml"),
        (Place.SHIPPED, "nvidia-h200.yaml"),
    ]
    found = find_serving(H200, "sglang")
    assert found.file is not None
    assert found.file.place is Place.USER
    named = find_serving(H200, "sglang", Switches(policy=str(shipped / "nvidia-h200.yaml")))
    assert named.file is not None
    assert named.file.place is Place.NAMED


def test_a_users_file_in_which_nothing_serves_any_more_does_not_hide_what_ships(shipped: Path) -> None:
    user_policies().mkdir(parents=True)
    write_policy(user_policies() / "nvidia-h200.yaml", policy(table(builds=("sgl-flash-mla==0.9",))))
    write_policy(shipped / "nvidia-h200.yaml", anywhere(policy()))
    found = find_serving(H200)
    assert found.file is not None
    assert found.file.place is Place.SHIPPED
    (why,) = found.passed_over
    assert why.endswith("nvidia-h200.yaml: sgl-flash-mla must be 0.9: it is not installed")
    (user_policies() / "nvidia-h200.yaml").write_text("schema: 99\n")
    assert find_serving(H200).complete


def test_the_users_folder_is_named_or_xdgs(tmp_path: Path) -> None:
    assert user_policies({"MLA_TUNE_HOME": str(tmp_path)}) == tmp_path / "policies"
    assert user_policies({"XDG_DATA_HOME": str(tmp_path)}) == tmp_path / "mla-tune" / "policies"
    assert user_policies({"XDG_DATA_HOME": "relative"}) == Path.home() / ".local/share/mla-tune/policies"


def see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mla_tune.hardware.nvml.detect_gpu", lambda: GpuIdentity("NVIDIA H200", "nvidia-h200", 132, "580.1")
    )
    monkeypatch.delenv("MLA_TUNE_POLICY", raising=False)


@pytest.mark.parametrize(
    ("level", "complete", "expected"),
    [
        (logging.INFO, True, [logging.INFO]),
        (logging.INFO, False, [logging.INFO]),
        (logging.WARNING, True, []),
        (logging.WARNING, False, [logging.WARNING]),
    ],
)
def test_one_line_at_start_says_what_serves_as_a_warning_where_it_would_go_unseen(
    level: int,
    complete: bool,
    expected: list[int],
    shipped: Path,
    install: Install,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    see(monkeypatch)
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    if complete:
        install("sgl-deep-gemm", "0.1.2", "deep_gemm")
    write_policy(shipped / "nvidia-h200.yaml", flash_mla())
    caplog.set_level(level, logger="mla_tune")
    dispatcher = Dispatcher.for_this_gpu()
    lines = [record for record in caplog.records if "tables serve own" in record.getMessage()]
    assert [record.levelno for record in lines] == expected
    assert "40 of 40 tables serve own" in dispatcher.summary


def test_ranks_whose_builds_differ_do_not_decide_by_the_same_line(
    shipped: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch)
    install("sgl-flash-mla", "1.0.0", "flash_mla")
    write_policy(shipped / "nvidia-h200.yaml", flash_mla())
    without = Dispatcher.for_this_gpu().decides_by
    install("sgl-deep-gemm", "0.1.2", "deep_gemm")
    assert Dispatcher.for_this_gpu().decides_by != without
