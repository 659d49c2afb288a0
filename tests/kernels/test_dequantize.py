import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.formats import DSA, V4, KVFormat, page_parts, quantize_k_cache
from mla_tune.kernels.reference import dequantize_reference
from mla_tune.sites.launch_parameters import DequantizeConfig
from tests.conftest import Target
from tests.kernels.test_formats import FORMATS, random_values

GUARD = 3
BF16_SMALLEST_NORMAL = 2.0**-126
CONFIGS = [
    None,
    DequantizeConfig(1, 2),
    DequantizeConfig(8, 4, stream_loads=True, stream_stores=True),
    DequantizeConfig(2, 1, programs_per_sm=1),
]


def dequantize_between_guards(
    target: Target,
    cache: torch.Tensor,
    slots: torch.Tensor,
    fmt: KVFormat,
    page_size: int,
    config: DequantizeConfig | None = None,
) -> torch.Tensor:
    """The rows of ``slots``, written to the middle of a workspace of NaN whose other rows must stay as they were."""
    rows = slots.shape[0]
    workspace = torch.full((rows + 2 * GUARD, fmt.head_dim), torch.nan, dtype=torch.bfloat16, device=target.device)
    before = workspace.view(torch.int16).clone()
    out = workspace[GUARD : GUARD + rows]
    dequantize_k_cache_paged(cache, slots, out, fmt, page_size, config, target.backend)
    after = workspace.view(torch.int16)
    assert torch.equal(after[:GUARD], before[:GUARD])
    assert torch.equal(after[GUARD + rows :], before[GUARD + rows :])
    return out


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, target: Target | None = None) -> None:
    """Equal to the last bit, unless Triton's interpreter made ``actual``: it truncates to bf16, and to wrong subnormals."""
    rtol, atol = (2.0**-7, BF16_SMALLEST_NORMAL) if target and target.interpreted else (0.0, 0.0)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def readable(target: Target, codes: torch.Tensor) -> torch.Tensor:
    """Which e4m3 codes to compare: all, but for NaN in Triton's interpreter, which reads it as 480."""
    return ((codes & 0x7F) != 0x7F) if target.interpreted else torch.ones_like(codes, dtype=torch.bool)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@given(data=st.data(), page_size=st.sampled_from([2, 5, 64, 256]), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_rows_are_gathered_as_the_reference_does_and_minus_one_gives_zeros(
    target: Target, fmt: KVFormat, data: st.DataObject, page_size: int, seed: int
) -> None:
    num_tokens = data.draw(st.integers(1, 40))
    ids = data.draw(st.lists(st.integers(-1, num_tokens - 1), max_size=13))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    config = data.draw(st.sampled_from(CONFIGS))
    cache = quantize_k_cache(random_values(num_tokens, fmt, seed, target.device), fmt, page_size)
    slots = torch.tensor(ids, dtype=dtype, device=target.device)
    out = dequantize_between_guards(target, cache, slots, fmt, page_size, config)
    assert_equal(out, dequantize_reference(cache, slots, fmt, page_size), target)
    assert out.isfinite().all()
    assert (out[slots < 0] == 0).all()


def test_many_rows_take_many_programs(target: Target) -> None:
    cache = quantize_k_cache(random_values(300, V4, 1, target.device), V4, 64)
    slots = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(target.device)
    out = dequantize_between_guards(target, cache, slots, V4, 64)
    assert_equal(out, dequantize_reference(cache, slots, V4, 64))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 17, 40, 41])
def test_a_count_on_the_device_says_how_many_rows_are_written(
    target: Target, count: int, config: DequantizeConfig | None
) -> None:
    cache = quantize_k_cache(random_values(40, V4, 1, target.device), V4, 64)
    slots = torch.arange(39, -1, -1, dtype=torch.int32, device=target.device)
    out = torch.full((40, 512), torch.nan, dtype=torch.bfloat16, device=target.device)
    counted = torch.tensor([count], dtype=torch.int32, device=target.device)
    dequantize_k_cache_paged(cache, slots, out, V4, 64, config, target.backend, counted)
    kept = min(count, 40)
    assert_equal(out[:kept], dequantize_reference(cache, slots[:kept], V4, 64), target)
    assert out[kept:].isnan().all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_row_that_no_token_filled_is_nan(target: Target, fmt: KVFormat) -> None:
    cache = quantize_k_cache(random_values(3, fmt, 0, target.device), fmt, 2)
    out = dequantize_between_guards(target, cache, torch.tensor([2, 3], device=target.device), fmt, 2)
    assert out[0].isfinite().all()
    assert out[1, fmt.nope_dim :].isnan().all()
    assert out[1, : fmt.nope_dim].isnan().all()


def test_every_v4_scale_times_every_code_is_exact(target: Target) -> None:
    # 256 scales x 4 groups of 64 codes, 7 groups a token: scale 0 is 2**-127, 255 is NaN, 254 overflows to infinity.
    num_tokens = -(-1024 // 7)
    cache = torch.zeros(num_tokens, V4.page_bytes(1), dtype=torch.uint8)
    groups = torch.arange(num_tokens * 7).view(num_tokens, 7) % 1024
    parts = page_parts(cache, V4, 1)
    parts.scales[:, 0, :7] = (groups // 4).to(torch.uint8)
    codes = ((groups % 4 * 64)[:, :, None] + torch.arange(64)).view(num_tokens, 448).to(torch.uint8)
    parts.nope[:, 0] = codes
    cache = cache.to(target.device)
    slots = torch.arange(num_tokens, device=target.device)
    expected = dequantize_reference(cache, slots, V4, 1)
    out = dequantize_between_guards(target, cache, slots, V4, 1)
    compared = readable(target, codes.to(target.device))
    assert_equal(out[:, :448][compared], expected[:, :448][compared], target)
    assert (out[:, 448:] == 0).all()


def test_dsa_scales_may_be_any_float(target: Target) -> None:
    scales = torch.tensor([0.0, 1.0, -3.7, 1e-30, 3e38, torch.inf, torch.nan, 0.1])
    cache = torch.zeros(4, DSA.page_bytes(1), dtype=torch.uint8)
    parts = page_parts(cache, DSA, 1)
    parts.scales[:, 0] = scales.view(2, 4).repeat(2, 1).view(torch.uint8)
    codes = (torch.tensor([0, 0, 128, 128])[:, None] + torch.arange(512)[None, :] % 128).to(torch.uint8)
    parts.nope[:, 0] = codes
    cache = cache.to(target.device)
    slots = torch.arange(4, device=target.device)
    expected = dequantize_reference(cache, slots, DSA, 1)
    out = dequantize_between_guards(target, cache, slots, DSA, 1)
    compared = readable(target, codes.to(target.device))
    assert_equal(out[:, :512][compared], expected[:, :512][compared], target)


def test_wrong_arguments_are_refused_in_one_line() -> None:
    cache = quantize_k_cache(torch.ones(4, 512), V4, 2)
    slots = torch.zeros(3, dtype=torch.int32)
    good = torch.empty(3, 512, dtype=torch.bfloat16)
    for slot_ids, out in (
        (slots, good[:2]),
        (slots, good.float()),
        (slots, torch.empty(3, 1024, dtype=torch.bfloat16)[:, :512]),
        (slots.float(), good),
        (slots.view(3, 1), good),
    ):
        with pytest.raises(UsageError) as error:
            dequantize_k_cache_paged(cache, slot_ids, out, V4, 2)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="page size 64"):
        dequantize_k_cache_paged(cache, slots, good, V4, 64)
    with pytest.raises(UsageError, match="power of two"):
        DequantizeConfig(rows_per_program=3)


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_rows_past_two_gib_of_cache_are_read_from_where_they_lie(fmt: KVFormat) -> None:
    page_size = 64
    num_pages = 3 * (1 << 30) // fmt.page_bytes(page_size)
    pool = torch.full((num_pages, fmt.page_bytes(page_size)), 0xFF, dtype=torch.uint8, device="cuda")
    small = quantize_k_cache(random_values(4 * page_size, fmt, 0, "cuda"), fmt, page_size)
    pool[-4:] = small
    near = torch.arange(4 * page_size, dtype=torch.int32, device="cuda")
    out = torch.full((4 * page_size, fmt.head_dim), torch.nan, dtype=torch.bfloat16, device="cuda")
    dequantize_k_cache_paged(pool, near + (num_pages - 4) * page_size, out, fmt, page_size)
    assert_equal(out, dequantize_reference(small, near, fmt, page_size))


@pytest.mark.gpu
def test_output_past_two_gib_elements_is_written_where_it_belongs() -> None:
    rows = (1 << 31) // 512 + 5
    cache = quantize_k_cache(random_values(64, V4, 0, "cuda"), V4, 64)
    slots = torch.arange(rows, dtype=torch.int32, device="cuda") % 64
    out = torch.full((rows, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    dequantize_k_cache_paged(cache, slots, out, V4, 64)
    assert_equal(out[-64:], dequantize_reference(cache, slots[-64:], V4, 64))
    assert bool(out[::4097].isfinite().all())
