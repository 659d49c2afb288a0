"""SKUs: what users type, what drivers say, and when two environments are the same."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.hardware.sku import CPU, SKUS, Environment, KernelLibrary, Sku, resolve_sku, sku_name

ENVIRONMENT = Environment("nvidia-h200", 132, 232448, "580.95", "13.0", "2.11.0", "3.6.0", ())


@pytest.mark.parametrize("name", [CPU, *(sku.name for sku in SKUS)])
def test_a_sku_is_found_by_its_full_or_short_name_in_any_case(name: str) -> None:
    short = name.removeprefix("nvidia-")
    assert {resolve_sku(word) for word in (name, short, name.upper(), short.upper(), f" {short}\n")} == {name}


@given(st.text(max_size=12))
def test_whatever_is_typed_is_a_known_sku_or_refused_in_one_line(word: str) -> None:
    names = {name for sku in SKUS for name in (sku.name, sku.name.removeprefix("nvidia-"))} | {CPU}
    if word.strip().lower() in names:
        assert resolve_sku(word).endswith(word.strip().lower())
        return
    with pytest.raises(UsageError, match="accepted: auto, cpu, h20, h100") as caught:
        resolve_sku(word)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100"),
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H20", "nvidia-h20"),
        ("NVIDIA H20-3e", "nvidia-h20-3e"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA H100 NVL", "nvidia-h100-nvl"),
        ("NVIDIA H100 80GB HBM2e", "nvidia-h100-80gb-hbm2e"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "nvidia-h100-80gb-hbm3-mig-1g-10gb"),
        ("NVIDIA H100", "nvidia-h100-other"),  # no driver says so: whatever it is, it is not the SXM part
        ("NVIDIA H200 NVL", "nvidia-h200-nvl"),
        ("NVIDIA H200-71C", "nvidia-h200-71c"),
        ("NVIDIA H800 PCIe", "nvidia-h800-pcie"),
        ("NVIDIA GB300", "nvidia-gb300"),
        ("NVIDIA GH200 144G HBM3e", "nvidia-gh200-144g-hbm3e"),
        ("NVIDIA H800", "nvidia-h800"),
        ("NVIDIA B200", "nvidia-b200"),
        ("NVIDIA GB200", "nvidia-gb200"),
        ("NVIDIA B300 SXM6 AC", "nvidia-b300"),
        ("NVIDIA GH200 480GB", "nvidia-gh200-480gb"),  # not an H200: another host link, another name
        ("NVIDIA L4", "nvidia-l4"),
        ("Tesla T4", "nvidia-tesla-t4"),
    ],
)
def test_the_drivers_product_name_gives_the_sku(product: str, name: str) -> None:
    assert sku_name(product) == name


@given(st.text(min_size=1, max_size=30))
def test_any_product_name_gives_a_file_name_and_the_canonical_one_is_stable(product: str) -> None:
    name = sku_name(product)
    assert re.fullmatch(r"nvidia-[a-z0-9-]*", name)


@given(st.sampled_from(SKUS), st.sampled_from(" -"), st.text("abcdefgvwxyz0123456789-.", min_size=1, max_size=12))
def test_a_known_product_with_more_words_in_its_name_is_another_product(sku: Sku, joint: str, more: str) -> None:
    assert sku_name(f"NVIDIA {sku.product}") == sku.name
    assert sku_name(f"NVIDIA {sku.product}{joint}{more}") not in {known.name for known in SKUS}


@pytest.mark.parametrize("sku", SKUS, ids=lambda sku: sku.name)
def test_a_known_name_with_another_memory_or_under_a_hypervisor_is_another_product(sku: Sku) -> None:
    product = f"NVIDIA {sku.product}"
    for part in (0.93, 0.98, 1.0):  # what drivers report of the memory as sold
        assert sku_name(product, memory_gib=round(sku.memory_gb * part)) == sku.name
    names = {sku_name(product, memory_gib=round(sku.memory_gb * part)) for part in (0.25, 0.5, 1.2)}
    names.add(sku_name(product, shared=True))
    assert len(names) == 4
    assert not names & {known.name for known in SKUS}


NUMBERS = ("sm_count", "shared_memory_optin_bytes", "memory_gib", "power_limit_w")


def test_every_field_of_an_environment_is_part_of_its_id() -> None:
    library = KernelLibrary("sgl-flash-mla", "1.0.0", "ab")
    changed = [
        replace(ENVIRONMENT, **{f.name: library if f.name == "libraries" else "other"})  # type: ignore[arg-type]
        for f in fields(ENVIRONMENT)
        if f.name not in ("libraries", *NUMBERS)
    ]
    changed += [replace(ENVIRONMENT, **{name: 1}) for name in NUMBERS]  # type: ignore[arg-type]
    changed += [
        replace(ENVIRONMENT, libraries=libraries)
        for libraries in ((library,), (replace(library, version="2"),), (replace(library, sha256="cd"),))
    ]
    ids = [environment.id for environment in (ENVIRONMENT, *changed)]
    assert len(set(ids)) == len(ids) == len(fields(ENVIRONMENT)) + 3


def test_equal_environments_have_one_id_of_16_hex_digits() -> None:
    assert ENVIRONMENT.id == replace(ENVIRONMENT).id
    assert re.fullmatch(r"[0-9a-f]{16}", ENVIRONMENT.id)
