import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.formats import DSA, V4, KVFormat, kv_format, page_parts, paged_view, quantize_k_cache
from mla_tune.kernels.reference import dequantize_reference, e4m3_value
from mla_tune.sites.site import LayerType

FORMATS = [V4, DSA]


def random_values(num_tokens: int, fmt: KVFormat, seed: int, device: str = "cpu") -> torch.Tensor:
    """Normals whose magnitude differs a lot from token to token, with one token of zeros."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp2(torch.randint(-40, 40, (num_tokens, 1), generator=generator).float())
    values = torch.randn(num_tokens, fmt.head_dim, generator=generator) * magnitude
    values[num_tokens // 2 : num_tokens // 2 + 1] = 0
    return values.bfloat16().to(device)


def test_pages_have_the_sizes_that_engines_allocate() -> None:
    assert [V4.page_bytes(size) for size in (256, 64, 2)] == [149760, 37440, 1728]
    assert DSA.page_bytes(64) == 64 * 656
    assert (V4.bytes_per_token, DSA.bytes_per_token) == (584, 656)
    assert (V4.head_dim, DSA.head_dim) == (512, 576)


def test_only_dsa_layers_have_the_dsa_format() -> None:
    assert {layer: kv_format(layer).name for layer in LayerType} == {
        LayerType.SWA_ONLY: "v4",
        LayerType.C4A: "v4",
        LayerType.C128A: "v4",
        LayerType.DSA: "dsa",
    }


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_the_paged_view_shares_the_cache_and_steps_over_its_padding(fmt: KVFormat) -> None:
    cache = torch.zeros(3, fmt.page_bytes(2), dtype=torch.uint8)
    view = paged_view(cache, fmt, 2)
    assert view.shape == (3, 2, 1, fmt.bytes_per_token)
    assert view.stride(0) == fmt.page_bytes(2)
    view[2, 0, 0, 0] = 7
    assert cache[2, 0] == 7


def test_the_reference_decodes_every_e4m3_code_as_torch_does() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(
        torch.tensor([e4m3_value(c) for c in range(256)]), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@given(num_tokens=st.integers(1, 20), page_size=st.sampled_from([1, 2, 5, 64]), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_quantizing_loses_no_more_than_e4m3_and_bf16_do(
    device: str, fmt: KVFormat, num_tokens: int, page_size: int, seed: int
) -> None:
    values = random_values(num_tokens, fmt, seed, device)
    cache = quantize_k_cache(values, fmt, page_size)
    assert cache.shape == (-(-num_tokens // page_size), fmt.page_bytes(page_size))
    back = dequantize_reference(cache, torch.arange(num_tokens, device=device), fmt, page_size)
    assert torch.equal(back[:, fmt.nope_dim :], values[:, fmt.nope_dim :])
    nope, quantized = values[:, : fmt.nope_dim].float(), back[:, : fmt.nope_dim].float()
    amax = nope.view(num_tokens, fmt.num_groups, -1).abs().amax(-1).repeat_interleave(fmt.group_size, dim=1)
    # Half a step: 2**-4 of the value for e4m3 and 2**-9 for bf16; scale * 2**-10 where e4m3 is subnormal. The scale is
    # at most 2 * amax / 448.
    bound = nope.abs() * (2.0**-4 + 2.0**-8) + 2 * amax / 448 * 2.0**-10
    assert ((nope - quantized).abs() <= bound).all()


@given(num_tokens=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_every_v3_2_scale_is_a_power_of_two_so_that_a_build_that_truncates_it_reads_the_same_values(
    num_tokens: int, seed: int
) -> None:
    cache = quantize_k_cache(random_values(num_tokens, DSA, seed), DSA, 64)
    scales = page_parts(cache, DSA, 64).scales[0, :num_tokens].contiguous().view(torch.float32)
    assert (torch.frexp(scales).mantissa == 0.5).all()


@given(st.floats(2.0**-100, 2.0**100), st.integers(0, 63))
@settings(max_examples=100)
def test_a_v4_scale_is_the_smallest_power_of_two_that_holds_its_group(amax: float, column: int) -> None:
    values = torch.zeros(1, V4.head_dim)
    values[0, 64 + column] = -amax
    scale = 2.0 ** (int(page_parts(quantize_k_cache(values, V4, 1), V4, 1).scales[0, 0, 1]) - 127)
    stored = float(values[0].abs().max())
    assert stored <= 448 * scale
    assert stored > 448 * scale / 2


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_rows_without_a_token_are_nan_in_every_value(device: str, fmt: KVFormat) -> None:
    cache = quantize_k_cache(random_values(3, fmt, 0, device), fmt, 2)
    rows = dequantize_reference(cache, torch.arange(4, device=device), fmt, 2)
    assert rows[:3].isfinite().all()
    assert rows[3].isnan().all()


def test_a_wrong_head_dimension_or_cache_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"\(num_tokens, 512\).*576") as error:
        quantize_k_cache(torch.zeros(1, 576), V4, 64)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="149760"):
        paged_view(torch.zeros(2, 256 * 584, dtype=torch.uint8), V4, 256)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from mla_tune.kernels.adapters import attention_cpu
from mla_tune.kernels import combine, dequantize, formats, indexer_metadata, reference, slot_ids
cache = formats.quantize_k_cache(torch.ones(2, 512), formats.V4, 2)
out = torch.empty(2, 512, dtype=torch.bfloat16)
dequantize.dequantize_k_cache_paged(cache, torch.arange(2), out, formats.V4, 2)
assert (out == 1).all()
"""


def test_the_cpu_path_works_where_triton_cannot_be_imported() -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
