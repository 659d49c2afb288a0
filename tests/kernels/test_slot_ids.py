import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.reference import compressed_row_ids_reference, swa_token_ids_reference
from mla_tune.kernels.slot_ids import build_compressed_row_ids, build_swa_token_ids
from mla_tune.sites.launch_parameters import SlotIdsConfig
from tests.conftest import Target

POISON = -77
GUARD = 5


def page_table(lens: list[int], page_size: int, seed: int, device: str) -> torch.Tensor:
    """A random permutation of a pool's pages: int32 (num_reqs, max_pages)."""
    max_pages = max([-(-length // page_size) for length in lens] + [1])
    pages = torch.randperm(len(lens) * max_pages, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return pages.view(len(lens), max_pages).to(device)


def prefix(counts: list[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(device=device, dtype=dtype)


def poisoned(rows: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A buffer of poison and the slice of it that is to be written."""
    buffer = torch.full((rows + 2 * GUARD,), POISON, dtype=torch.int32, device=device)
    return buffer, buffer[GUARD : GUARD + rows]


def assert_guards(buffer: torch.Tensor) -> None:
    assert (buffer[:GUARD] == POISON).all()
    assert (buffer[-GUARD:] == POISON).all()


REQUESTS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 200)), min_size=1, max_size=70)
"""(context before the new tokens, new tokens) of each request; either may be nothing."""


@given(requests=REQUESTS, page_size=st.sampled_from([256, 64, 7]), seed=st.integers(0, 9), wide=st.booleans())
@settings(max_examples=25)
def test_window_slots_are_those_of_the_last_positions(
    target: Target, requests: list[tuple[int, int]], page_size: int, seed: int, wide: bool
) -> None:
    dtype = torch.int64 if wide else torch.int32
    seqs = [before + extend for before, extend in requests]
    counts = [min(seq, extend + 127) for seq, (_, extend) in zip(seqs, requests, strict=True)]
    table = page_table(seqs, page_size, seed, target.device)
    cu_rows = prefix(counts, dtype, target.device)
    seq_lens = torch.tensor(seqs, dtype=dtype, device=target.device)
    buffer, out = poisoned(sum(counts), target.device)
    build_swa_token_ids(table, seq_lens, cu_rows, out, page_size, backend=target.backend)
    assert torch.equal(out, swa_token_ids_reference(table, seq_lens, cu_rows, page_size))
    assert (out >= 0).all()
    assert_guards(buffer)


@given(
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=70),
    rectangular=st.booleans(),
    page_size=st.sampled_from([2, 64]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25)
def test_compressed_slots_are_those_of_the_first_rows_and_minus_one_past_them(
    target: Target, counts: list[int], rectangular: bool, page_size: int, seed: int
) -> None:
    room = [max(counts)] * len(counts) if rectangular else counts
    table = page_table(counts, page_size, seed, target.device)
    cu_rows = prefix(room, torch.int64, target.device)
    row_counts = torch.tensor(counts, dtype=torch.int32, device=target.device)
    buffer, out = poisoned(sum(room), target.device)
    build_compressed_row_ids(table, row_counts, cu_rows, out, page_size, SlotIdsConfig(256, 1), target.backend)
    assert torch.equal(out, compressed_row_ids_reference(table, row_counts, cu_rows, page_size))
    assert int((out >= 0).sum()) == sum(counts)
    assert_guards(buffer)


def test_entries_behind_the_last_request_are_minus_one(target: Target) -> None:
    table = page_table([5], 2, 0, target.device)
    _, out = poisoned(9, target.device)
    lens = torch.tensor([5], dtype=torch.int32, device=target.device)
    build_compressed_row_ids(table, lens, prefix([5], torch.int64, target.device), out, 2, backend=target.backend)
    assert out[5:].tolist() == [-1] * 4
    assert (out[:5] >= 0).all()


def test_pages_may_be_absent_where_nothing_is_read(target: Target) -> None:
    # The window cache of a long context holds its last pages only.
    table = torch.tensor([[-1, -1, 3, 0]], dtype=torch.int32, device=target.device)
    _, out = poisoned(6, target.device)
    lens = torch.tensor([16], dtype=torch.int32, device=target.device)
    build_swa_token_ids(table, lens, prefix([6], torch.int64, target.device), out, 4, backend=target.backend)
    assert out.tolist() == [14, 15, 0, 1, 2, 3]


def test_no_rows_and_no_requests_write_nothing(target: Target) -> None:
    _, out = poisoned(0, target.device)
    empty = torch.zeros(0, dtype=torch.int32, device=target.device)
    table = empty.view(0, 1)
    build_swa_token_ids(table, empty, prefix([], torch.int64, target.device), out, 64, backend=target.backend)
    build_compressed_row_ids(table, empty, prefix([], torch.int64, target.device), out, 64, backend=target.backend)
    assert out.shape == (0,)


def test_wrong_arguments_are_refused_in_one_line() -> None:
    table, lens, cu_rows = page_table([5, 5], 2, 0, "cpu"), torch.tensor([5, 5]), prefix([5, 5], torch.int64, "cpu")
    out = torch.zeros(10, dtype=torch.int32)
    for arguments in (
        (table[:1], lens, cu_rows, out),
        (table, lens, cu_rows[1:], out),
        (table, lens, cu_rows, out.long()),
    ):
        with pytest.raises(UsageError) as error:
            build_compressed_row_ids(*arguments, 2)
        assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_sixteen_million_rows_of_many_requests_agree_with_the_torch_version() -> None:
    counts = [(1 << 18) - 37 * request for request in range(64)]
    table = page_table(counts, 64, 0, "cuda")
    cu_rows = prefix(counts, torch.int64, "cuda")
    row_counts = torch.tensor(counts, dtype=torch.int32, device="cuda")
    _, out = poisoned(sum(counts), "cuda")
    build_compressed_row_ids(table, row_counts, cu_rows, out, 64)
    expected = torch.full_like(out, POISON).cpu()
    build_compressed_row_ids(table.cpu(), row_counts.cpu(), cu_rows.cpu(), expected, 64)
    assert torch.equal(out.cpu(), expected)
