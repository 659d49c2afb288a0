"""Which shipped tables serve beside which released engine, and why the others do not: the day a pin moves, this fails.

Each engine is laid out with the kernel packages that its released wheel pins, and everything is read off that as a server
and a sweep would. With ``MLA_TUNE_NEWEST_ENGINES=1`` (scripts/check_newest_engines) the newest releases are asked instead
of the supported ones, and the failure says what to measure again.
"""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest

from mla_tune.bench.environment import kernel_libraries
from mla_tune.hardware.builds import Build
from mla_tune.integrations.sglang.sglang_state import RELEASES as SGLANG_RELEASES
from mla_tune.integrations.vllm.vllm_state import RELEASES as VLLM_RELEASES
from mla_tune.policy.codec import parse_policy
from mla_tune.policy.schema import Policy
from mla_tune.policy.search import packaged_policies, policy_file
from mla_tune.runtime.serving import GpuKey, Serving, find_serving
from mla_tune.runtime.switches import Switches
from mla_tune.sites.provider import SGLANG_KERNEL
from tests.engines.conftest import FLASH_MLA, Install
from tests.engines.released import kernel_pins, newest

GPUS = ("nvidia-h100", "nvidia-h200", "nvidia-b200")
NEWEST = os.environ.get("MLA_TUNE_NEWEST_ENGINES") == "1"
ENGINES = [("sglang", release) for release in SGLANG_RELEASES] + [("vllm", release) for release in VLLM_RELEASES]


def shipped(engine: str, gpu: str) -> Policy:
    """The first policy that ships for an engine on a GPU."""
    file = policy_file(gpu, engine)
    return parse_policy(file.path.read_bytes(), str(file))


def left_out(found: Serving) -> dict[str, int]:
    """How many tables do not serve, by the reason."""
    return {group.reason: len(group.tables) for group in found.left_out if group.candidate is None}


@pytest.mark.skipif(NEWEST, reason="asks the newest releases alone")
@pytest.mark.parametrize(("engine", "release"), ENGINES)
def test_what_serves_beside_a_released_engine_is_what_its_pins_allow(
    engine: str, release: str, install: Install
) -> None:
    pins = install(engine, release)
    recorded = {library.name: library.version for library in kernel_libraries()}
    # A sweep beside it records the FlashMLA that this engine calls, under the distribution that brings it.
    flash_mla = [name for name in (FLASH_MLA, SGLANG_KERNEL) if name in pins][:1]
    assert recorded == {name: pins[name] for name in flash_mla}

    for gpu in GPUS:
        found = find_serving(GpuKey(gpu), engine)
        if shipped(engine, gpu).evidence == "modelled":
            assert not found.tables
            assert found.fault is not None
            assert found.fault.startswith("it is modelled, and must be measured")
            continue
        tables = shipped(engine, gpu).tables
        if engine == "vllm":
            assert not found.tables
            assert set(left_out(found)) == {f"{FLASH_MLA} must be 1.0.0: vLLM runs the flash_mla of its own wheel"}
        elif FLASH_MLA not in pins:
            # FlashMLA is in sglang-kernel there: nothing that was measured with another serves attention.
            assert {table.site for table in found.tables} <= {"indexer_metadata"}
            lacks = f"{FLASH_MLA} must be 1.0.0: this SGLang runs the flash_mla in sglang-kernel"
            assert lacks in "; ".join([*left_out(found), *found.passed_over])
        else:
            assert (len(found.tables), found.total) == (len(tables), len(tables))
            (group,) = found.left_out
            measured = next(
                of.version for of in shipped(engine, gpu).environment.libraries if of.name == "sgl-deep-gemm"
            )
            assert (group.candidate, group.reason) == (
                "deep_gemm",
                f"sgl-deep-gemm must be {measured}: got {pins['sgl-deep-gemm']}",
            )


@pytest.mark.skipif(NEWEST, reason="asks the newest releases alone")
def test_a_stock_sglang_takes_every_table_of_the_h200_without_a_variable_set(install: Install) -> None:
    """A new user's machine, whose DeepGEMM and sglang-kernel are not those of the sweep."""
    pins = install("sglang", SGLANG_RELEASES[-1])
    tables = shipped("sglang", "nvidia-h200").tables
    found = find_serving(GpuKey("nvidia-h200", 132), "sglang")
    assert [(t.site, t.model, t.h_q, t.layer) for t in found.tables] == [
        (t.site, t.model, t.h_q, t.layer) for t in tables
    ]
    assert pins["sglang-kernel"] not in (shipped("sglang", "nvidia-h200").provider or "")


@pytest.mark.skipif(NEWEST, reason="asks the newest releases alone")
@pytest.mark.parametrize("gpu", ["nvidia-b200"])
def test_a_modelled_policy_serves_a_stock_sglang_where_it_is_allowed(gpu: str, install: Install) -> None:
    install("sglang", SGLANG_RELEASES[-1])
    policy = shipped("sglang", gpu)
    found = find_serving(GpuKey(gpu), "sglang", Switches(allow_modelled=True))
    assert len(found.tables) == found.total >= len([t for t in policy.tables if t.engine == "sglang"])


@pytest.mark.skipif(not NEWEST, reason="asks the newest releases: scripts/check_newest_engines")
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_newest_release_of_an_engine_is_one_that_is_supported_with_the_pins_that_were_measured(
    engine: str, install: Install
) -> None:
    release = newest(engine)
    pins = install(engine, release)
    moved = []
    if (engine, release) not in ENGINES:
        moved.append(f"{engine} {release} is no release that the hooks were tested with")
    for name in (name for name in packaged_policies() if name.endswith(f".{engine}")):
        found = find_serving(GpuKey(name.removesuffix(f".{engine}")), engine)
        if found.file is None or not str(found.file).endswith(f"{name}.yaml"):
            moved.append(f"{name}: {found.summary}")
        moved += [
            f"{name}: {len(group.tables)} tables: {group.reason}; on that GPU, where {engine} {release} is installed, run "
            f"mla-tune sweep --provider {engine} and mla-tune fit --provider {engine}"
            for group in found.left_out
            if group.candidate is None
        ]
    stated = ", ".join(str(Build(name, pinned)) for name, pinned in sorted(pins.items())) or "its own wheel's kernels"
    assert not moved, "\n".join([f"{engine} {release} runs {stated}:", *moved])


def test_the_metadata_are_the_wheels_own() -> None:
    """Laid out metadata read back as what the index has: a mistake there would make every answer above its own."""
    assert kernel_pins("sglang", SGLANG_RELEASES[-1])[FLASH_MLA]
    assert kernel_pins("vllm", VLLM_RELEASES[-1]) == {}
    assert version("packaging")
