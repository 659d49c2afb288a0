import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.adapters.attention_cpu import schedule_cpu, sparse_fwd_cpu, with_kvcache_cpu
from mla_tune.kernels.formats import DSA, V4, KVFormat, PagedSelection, quantize_k_cache
from mla_tune.kernels.reference import attention_reference, dequantize_reference, paged_attention_reference
from tests.kernels.test_formats import FORMATS

HEADS = 3
TIGHT_SCRATCH = 100_000
"""Bytes that hold some thirty attended entries: every test takes several runs."""


def normals(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def selection(num_tokens: int, width: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices with holes and lengths from 0 to the width: int32 (num_tokens, width) and (num_tokens,)."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, rows, (num_tokens, width), generator=generator, dtype=torch.int32)
    return indices, torch.randint(0, width + 1, (num_tokens,), generator=generator, dtype=torch.int32)


SIZES = {"num_tokens": st.integers(0, 9), "width": st.integers(1, 40), "seed": st.integers(0, 99)}


def test_the_reference_over_all_rows_is_dense_attention(device: str) -> None:
    q, kv = normals(4, HEADS, 512).to(device), normals(7, 512, seed=1).to(device)
    indices = torch.arange(7, dtype=torch.int32, device=device).repeat(4, 1)
    out, lse = attention_reference(q, kv, indices, torch.full((4,), 7, device=device), 0.05)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None].transpose(1, 2), kv[None, None], kv[None, None], scale=0.05
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, torch.logsumexp(q @ kv.T * 0.05, -1), rtol=1e-4, atol=1e-5)


def test_a_sink_is_one_more_entry_without_a_value(device: str) -> None:
    q, kv = normals(2, HEADS, 512).to(device), normals(5, 512, seed=1).to(device)
    indices = torch.arange(5, device=device).repeat(2, 1)
    sink = torch.tensor([-torch.inf, 0.3, 50.0], device=device)
    lengths = torch.full((2,), 5, device=device)
    out, lse = attention_reference(q, kv, indices, lengths, 0.05, sink)
    plain, plain_lse = attention_reference(q, kv, indices, lengths, 0.05)
    weights = torch.softmax(torch.cat([q @ kv.T * 0.05, sink[None, :, None].expand(2, -1, 1)], -1), -1)
    torch.testing.assert_close(out, weights[..., :-1] @ kv, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, 0], plain[:, 0])
    torch.testing.assert_close(lse, plain_lse)


def test_a_query_with_nothing_to_attend_to_gives_zeros(device: str) -> None:
    q, kv = normals(2, HEADS, 512).to(device), torch.full((1, 512), torch.nan, device=device)
    indices = torch.tensor([[-1, -1], [0, 0]], device=device)
    out, lse = attention_reference(
        q, kv, indices, torch.tensor([2, 0], device=device), 1.0, torch.zeros(HEADS, device=device)
    )
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("head_dim", [512, 576])
@given(**SIZES, with_sink=st.booleans(), scratch_bytes=st.sampled_from([1, TIGHT_SCRATCH, 1 << 24]))
@settings(max_examples=25)
def test_the_cpu_kernel_over_a_workspace_agrees_with_the_reference(
    head_dim: int, num_tokens: int, width: int, seed: int, with_sink: bool, scratch_bytes: int
) -> None:
    q, kv = normals(num_tokens, HEADS, head_dim, seed=seed), normals(30, head_dim, seed=seed + 1).bfloat16()
    indices, lengths = selection(num_tokens, width, 29, seed)
    indices = torch.where(indices >= 0, indices + 1, -1)
    kv[0] = torch.nan  # row 0 is attended by nobody
    sink = normals(HEADS, seed=seed + 2) if with_sink else None
    out = sparse_fwd_cpu(q, kv, indices, lengths, head_dim**-0.5, sink, scratch_bytes=scratch_bytes)
    expected, _ = attention_reference(q, kv, indices, lengths, head_dim**-0.5, sink)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def paged(fmt: KVFormat, page_size: int, num_tokens: int, width: int, seed: int) -> PagedSelection:
    """A cache of 29 rows behind one that is NaN, and a selection that leaves that one out."""
    values = normals(30, fmt.head_dim, seed=seed)
    cache = quantize_k_cache(values, fmt, page_size)
    cache.view(-1)[: fmt.data_stride] = 0xFF
    indices, lengths = selection(num_tokens, width, 29, seed)
    return PagedSelection(cache, fmt, page_size, torch.where(indices >= 0, indices + 1, -1), lengths)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@given(**SIZES, scratch_bytes=st.sampled_from([1, TIGHT_SCRATCH, 1 << 24]))
@settings(max_examples=20)
def test_the_cpu_kernel_over_paged_caches_agrees_with_the_reference(
    fmt: KVFormat, num_tokens: int, width: int, seed: int, scratch_bytes: int
) -> None:
    q, sink = normals(num_tokens, HEADS, fmt.head_dim, seed=seed), normals(HEADS, seed=seed + 1)
    parts = [paged(fmt, 64, num_tokens, width, seed)]
    if fmt is V4:
        parts.append(paged(fmt, 2, num_tokens, 5, seed + 3))
    lengths = torch.stack([part.lengths for part in parts]).sum(0)
    schedule = schedule_cpu(lengths, HEADS, fmt.head_dim, scratch_bytes)
    out = with_kvcache_cpu(q, schedule, parts, 0.04, sink)
    expected, _ = paged_attention_reference(q, parts, 0.04, sink)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_both_cpu_paths_agree_on_the_same_rows() -> None:
    part = paged(DSA, 64, 6, 20, 5)
    q = normals(6, HEADS, 576).bfloat16()
    workspace = dequantize_reference(part.cache, torch.arange(30), DSA, 64)
    sparse = sparse_fwd_cpu(q, workspace, part.slot_ids, part.lengths, 0.04)
    paged_out = with_kvcache_cpu(q, schedule_cpu(part.lengths, HEADS, 576), [part], 0.04)
    assert sparse.dtype is paged_out.dtype is torch.bfloat16
    torch.testing.assert_close(sparse, paged_out)


@given(st.lists(st.integers(0, 300), max_size=60), st.sampled_from([1, TIGHT_SCRATCH, 1 << 20]))
@settings(max_examples=60)
def test_runs_cover_every_query_once_and_stay_within_the_scratch(lengths: list[int], scratch_bytes: int) -> None:
    schedule = schedule_cpu(torch.tensor(lengths, dtype=torch.int32), HEADS, 512, scratch_bytes)
    covered = [query for run in schedule.runs for query in range(run.start, run.stop)]
    assert covered == list(range(len(lengths)))
    entry_bytes = 4 * (512 + 2 * HEADS)
    costs = [(run.stop - run.start) * max(lengths[run]) * entry_bytes for run in schedule.runs]
    assert all(
        cost <= scratch_bytes or run.stop == run.start + 1 for cost, run in zip(costs, schedule.runs, strict=True)
    )


def test_a_schedule_of_other_queries_is_refused() -> None:
    part = paged(V4, 64, 4, 3, 0)
    with pytest.raises(UsageError, match="all 4 queries"):
        with_kvcache_cpu(normals(4, HEADS, 512), schedule_cpu(part.lengths[:3], HEADS, 512), [part], 1.0)
    with pytest.raises(UsageError, match="512"):
        with_kvcache_cpu(normals(4, HEADS, 576), schedule_cpu(part.lengths, HEADS, 576), [part], 1.0)
    with pytest.raises(UsageError, match="576"):
        sparse_fwd_cpu(normals(1, HEADS, 512), normals(1, 576), part.slot_ids[:1], part.lengths[:1], 1.0)
