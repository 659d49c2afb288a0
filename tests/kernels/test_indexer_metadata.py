from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.binding import Device
from mla_tune.kernels.indexer import request_indices
from mla_tune.kernels.indexer_metadata import paged_mqa_logits_metadata, paged_mqa_logits_metadata_serial, shares
from mla_tune.kernels.reference import metadata_reference
from mla_tune.sites.launch_parameters import MetadataConfig
from mla_tune.sites.provider import Provider
from mla_tune.sites.site import LayerType, Site, SiteName
from mla_tune.sweep.worker.correctness import IndexerJudge
from tests.conftest import Target

POISON = -77
LENGTHS = st.lists(st.one_of(st.integers(0, 3000), st.just(0), st.integers(0, 1 << 20)), max_size=400)


@given(
    lengths=LENGTHS,
    num_sms=st.sampled_from([1, 3, 16]),
    column=st.booleans(),
    config=st.sampled_from([None, MetadataConfig(2, 4, 1, 1), MetadataConfig(16, 16, 4, 4)]),
)
@settings(max_examples=60)
def test_the_schedule_is_the_references_whatever_the_number_of_rows(
    target: Target, lengths: list[int], num_sms: int, column: bool, config: MetadataConfig | None
) -> None:
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=target.device)
    if column:
        context_lens = context_lens[:, None]
    out = torch.full((num_sms + 1, 2), POISON, dtype=torch.int32, device=target.device)
    expected = metadata_reference(context_lens, num_sms)
    assert paged_mqa_logits_metadata(context_lens, 64, num_sms, out, config, target.backend) is out
    assert torch.equal(out, expected)
    assert torch.equal(paged_mqa_logits_metadata_serial(context_lens, 32, num_sms), expected)


@pytest.mark.parametrize("num_rows", [1, 128, 129, 132, 256, 257, 9000])
def test_a_gpus_worth_of_sms_is_served(target: Target, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    context_lens = torch.randint(0, 20000, (num_rows,), generator=generator, dtype=torch.int32).to(target.device)
    num_sms = 8 if target.interpreted else 132
    out = paged_mqa_logits_metadata(context_lens, 64, num_sms, backend=target.backend)
    assert torch.equal(out, metadata_reference(context_lens, num_sms))


@pytest.mark.parametrize("padding", [0, 300])
def test_the_last_sms_take_the_remainder_and_those_without_work_start_at_a_row_that_exists(
    target: Target, padding: int
) -> None:
    # DeepGEMM 0.1.5 and later load the length of the row that an SM starts at, also where it has no work.
    context_lens = torch.tensor([256, 1, *[0] * padding], dtype=torch.int32, device=target.device)
    out = paged_mqa_logits_metadata(context_lens, 64, 4, backend=target.backend)
    assert out.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [2 + padding, 0]]


@given(lengths=LENGTHS.filter(bool), num_sms=st.sampled_from([1, 3, 16]))
@settings(max_examples=40)
def test_no_sm_starts_behind_the_last_row(target: Target, lengths: list[int], num_sms: int) -> None:
    context_lens = torch.tensor(lengths, dtype=torch.int32, device=target.device)
    out = paged_mqa_logits_metadata(context_lens, 64, num_sms, backend=target.backend)
    assert (out[:-1, 0] < len(lengths)).all()


@pytest.mark.parametrize("num_rows", [128, 256, 257])
def test_the_longest_contexts_of_a_few_rows_stay_exact(target: Target, num_rows: int) -> None:
    context_lens = torch.full((num_rows,), (1 << 31) - 1, dtype=torch.int32, device=target.device)  # 2**23 splits each
    out = paged_mqa_logits_metadata(context_lens, 64, 5, backend=target.backend)
    assert torch.equal(out, metadata_reference(context_lens, 5))


def test_sums_past_32_bits_stay_exact(target: Target) -> None:
    # 4 tiles of 2**19 splits each would fit; 2**13 rows of 2**31 - 256 tokens are 2**36 splits.
    context_lens = torch.full((1 << 13,), (1 << 31) - 256 - 1, dtype=torch.int32, device=target.device)
    out = paged_mqa_logits_metadata(context_lens, 64, 4, backend=target.backend)
    assert torch.equal(out, metadata_reference(context_lens, 4))


def test_wrong_arguments_are_refused_in_one_line() -> None:
    good = torch.ones(4, dtype=torch.int32)
    for context_lens, block_kv, num_sms, out in (
        (good, 16, 4, None),
        (good, 64, 0, None),
        (good.long(), 64, 4, None),
        (good.view(2, 2), 64, 4, None),
        (good, 64, 4, torch.zeros(4, 2, dtype=torch.int32)),
    ):
        with pytest.raises(UsageError) as error:
            paged_mqa_logits_metadata(context_lens, block_kv, num_sms, out)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="16-byte"):
        MetadataConfig(columns=2)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 31, 64, 2048, 12288])
def test_the_sms_get_the_shares_that_deep_gemm_gives_them(num_rows: int) -> None:
    deep_gemm = pytest.importorskip("deep_gemm")
    generator = torch.Generator().manual_seed(num_rows)
    context_lens = torch.randint(1, 1 << 18, (num_rows, 1), generator=generator, dtype=torch.int32).cuda()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    expected = deep_gemm.get_paged_mqa_logits_metadata(context_lens, 64, num_sms)
    ours = paged_mqa_logits_metadata(context_lens, 64, num_sms)
    assert torch.equal(shares(context_lens, ours), shares(context_lens, expected))


@pytest.mark.gpu
def test_one_compiled_kernel_serves_every_number_of_rows() -> None:
    from mla_tune.kernels.device.schedule_kernels import _metadata

    for num_rows in (257, 272, 4096, 100_000):
        paged_mqa_logits_metadata(torch.ones(num_rows, dtype=torch.int32, device="cuda"), 64, 132)
    compiled_before = len(_metadata.device_caches[0][0])
    for num_rows in (258, 320, 8191):  # of the size classes that are compiled by now
        paged_mqa_logits_metadata(torch.ones(num_rows, dtype=torch.int32, device="cuda"), 64, 131)
    assert len(_metadata.device_caches[0][0]) == compiled_before


def scheduled(lengths: list[int], starts: list[int]) -> torch.Tensor:
    """The schedule whose SMs begin at the splits ``starts``."""
    ends = list(accumulate(-(-length // 256) for length in lengths))
    rows = [bisect_right(ends, start) for start in starts]
    return torch.tensor([(row, start - (ends[row - 1] if row else 0)) for row, start in zip(rows, starts, strict=True)])


@given(lengths=LENGTHS, num_sms=st.sampled_from([1, 3, 16]), data=st.data())
@settings(max_examples=60)
def test_schedules_agree_whoever_takes_what_is_left_over_and_not_if_one_takes_more(
    lengths: list[int], num_sms: int, data: st.DataObject
) -> None:
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    expected = shares(context_lens, metadata_reference(context_lens, num_sms))
    share, left = divmod(sum(-(-length // 256) for length in lengths), num_sms)
    sizes = data.draw(st.permutations([share + (sm < left) for sm in range(num_sms)]))
    assert torch.equal(shares(context_lens, scheduled(lengths, [0, *accumulate(sizes)])), expected)
    if num_sms > 1 and share:
        sizes = [sizes[0] - 1, sizes[1] + 1, *sizes[2:]]
        alike = sorted(sizes) == sorted(share + (sm < left) for sm in range(num_sms))
        assert torch.equal(shares(context_lens, scheduled(lengths, [0, *accumulate(sizes)])), expected) is alike


@pytest.mark.parametrize("entry", [(-1, 0), (3, 0), (0, -1), (0, 3), (2, 1)])
def test_a_schedule_of_rows_or_splits_that_there_are_not_agrees_with_none(entry: tuple[int, int]) -> None:
    context_lens = torch.tensor([512, 1], dtype=torch.int32)
    assert shares(context_lens, torch.tensor([(0, 0), entry, (2, 0)])).tolist() == [-1, -1]


@pytest.mark.parametrize("provider", [None, Provider("sglang", "0.5.23")])
def test_a_schedule_is_judged_by_how_much_each_sm_gets_and_not_by_which_gets_it(provider: Provider | None) -> None:
    site = Site(SiteName.INDEXER_METADATA, LayerType.C4A, provider=provider)
    lengths = [700, 300, 1]
    judge = IndexerJudge(site, torch.tensor(lengths, dtype=torch.int32), Device("cpu", 0, 4))
    for starts in ([0, 2, 4, 5, 6], [0, 1, 2, 4, 6], [0, 1, 3, 5, 6]):
        assert judge.verdict(scheduled(lengths, starts)) is None
    uneven = judge.verdict(scheduled(lengths, [0, 3, 4, 5, 6]))
    assert uneven == "2 of 4 SMs get another share than the reference gives: 1 to 3 splits instead of 1 to 2"
    for starts in ([1, 2, 4, 5, 6], [0, 2, 4, 6, 5], [0, 2, 4, 5, 5]):
        assert judge.verdict(scheduled(lengths, starts)) is not None


@pytest.mark.parametrize(
    ("release", "major", "passed"),
    [
        *(("0.1.2", 9, False), ("0.1.2", 10, False), ("0.2.3.post2", 10, False), ("0.2.5", 9, False), ("", 10, False)),
        *(("0.2.5", 10, True), ("0.2.10.post1", 10, True), ("0.2.5", 12, False)),
    ],
)
def test_deep_gemm_is_told_the_request_of_each_row_only_where_it_must_be(
    release: str, major: int, passed: bool
) -> None:
    context_lens = torch.tensor([[5], [5], [7]], dtype=torch.int32)
    indices = request_indices(release, major, context_lens)
    assert (indices is not None) == passed
    if indices is not None:
        assert indices.dtype is torch.int32
        assert indices.tolist() == [0, 1, 2]  # no two rows of one request: they would share an SM's task
