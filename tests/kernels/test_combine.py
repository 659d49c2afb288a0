from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.combine import combine_topk_swa_indices
from mla_tune.kernels.reference import combine_reference
from mla_tune.sites.launch_parameters import CombineConfig
from mla_tune.sites.site import LayerType
from tests.conftest import Target

POISON = -77


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of one call; tensors are named by their shapes in the function's own docstring."""

    layer: LayerType
    topk: int | None
    topk_indices: torch.Tensor | None
    positions: torch.Tensor
    token_to_req: torch.Tensor
    compressed_base: torch.Tensor
    window_base: torch.Tensor
    window_start: torch.Tensor
    width: int

    def run(self, target: Target, config: CombineConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and lengths from poisoned outputs."""
        num_tokens = self.positions.shape[0]
        out = torch.full((num_tokens, self.width), POISON, dtype=torch.int32, device=target.device)
        lengths = torch.full((num_tokens,), POISON, dtype=torch.int32, device=target.device)
        combine_topk_swa_indices(
            self.topk_indices,
            self.positions,
            self.token_to_req,
            self.compressed_base,
            self.window_base,
            self.window_start,
            self.layer,
            out,
            lengths,
            self.topk,
            config,
            target.backend,
        )
        return out, lengths

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`run` must give."""
        return combine_reference(
            self.topk_indices,
            self.positions,
            self.token_to_req,
            self.compressed_base,
            self.window_base,
            self.window_start,
            self.layer,
            self.width,
            self.topk,
        )


def make_case(
    layer: LayerType, requests: list[tuple[int, int]], topk: int, seed: int, device: str, wide: bool = False
) -> Case:
    """One forward of ``requests``, (context before the new tokens, new tokens), laid out as ``sparse_fwd`` does."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.int64 if wide else torch.int32
    seqs = [before + extend for before, extend in requests]
    positions = [position for before, extend in requests for position in range(before, before + extend)]
    token_to_req = [request for request, (_, extend) in enumerate(requests) for _ in range(extend)]
    windows = [min(seq, extend + 127) for seq, (_, extend) in zip(seqs, requests, strict=True)]
    rows = [seq // layer.compress_ratio if layer.compress_ratio else 0 for seq in seqs]
    indices = None
    selection = 0
    if layer in (LayerType.C4A, LayerType.DSA):
        indices = torch.randint(-1, 500, (len(positions), topk + 3), generator=generator, dtype=torch.int32)
        indices[torch.rand(indices.shape, generator=generator) < 0.2] = -1
        indices, selection = indices.to(device), topk
    elif layer is LayerType.C128A:
        selection = max(seqs) // 128
    compressed_base = torch.tensor([0, *rows]).cumsum(0)[:-1].to(device=device, dtype=bases)
    window_base = sum(rows) + torch.tensor([0, *windows]).cumsum(0)[:-1].to(device=device, dtype=bases)
    return Case(
        layer=layer,
        topk=topk if indices is not None else None,
        topk_indices=indices,
        positions=torch.tensor(positions, dtype=torch.int32, device=device),
        token_to_req=torch.tensor(token_to_req, dtype=torch.int32, device=device),
        compressed_base=compressed_base,
        window_base=window_base,
        window_start=torch.tensor([s - w for s, w in zip(seqs, windows, strict=True)], dtype=bases, device=device),
        width=-(-(selection + 128) // 128) * 128,
    )


REQUESTS = st.lists(st.tuples(st.integers(0, 700), st.integers(0, 9)), min_size=1, max_size=8)
CONFIGS = st.sampled_from([None, CombineConfig(1, 512, 1), CombineConfig(16, 64, 4)])


@pytest.mark.parametrize("layer", list(LayerType))
@given(
    requests=REQUESTS,
    topk=st.sampled_from([1, 5, 64, 130]),
    seed=st.integers(0, 99),
    config=CONFIGS,
    wide=st.booleans(),
)
@settings(max_examples=20)
def test_every_query_gets_its_selection_then_its_window_then_minus_one(
    target: Target,
    layer: LayerType,
    requests: list[tuple[int, int]],
    topk: int,
    seed: int,
    config: CombineConfig | None,
    wide: bool,
) -> None:
    case = make_case(layer, requests, topk, seed, target.device, wide)
    out, lengths = case.run(target, config)
    expected, expected_lengths = case.reference()
    assert torch.equal(out, expected)
    assert torch.equal(lengths, expected_lengths)


def test_the_first_tokens_of_a_context_attend_to_what_there_is(target: Target) -> None:
    case = make_case(LayerType.C128A, [(0, 256)], 0, 0, target.device)
    out, lengths = case.run(target)
    assert out[0, :2].tolist() == [2, -1]  # rows 0 and 1 are compressed ones, its own window row comes third
    assert out[127, :2].tolist() == [0, 2]
    assert lengths[[0, 126, 127, 128, 255]].tolist() == [1, 127, 129, 129, 130]
    assert out[255, :3].tolist() == [0, 1, 2 + 128]


def test_long_contexts_fill_the_widest_matrix(target: Target) -> None:
    case = make_case(LayerType.C128A, [((1 << 20) - 3, 3), (5, 2)], 0, 0, target.device)
    assert case.width == 8320
    out, lengths = case.run(target)
    expected, expected_lengths = case.reference()
    assert torch.equal(out, expected)
    assert torch.equal(lengths, expected_lengths)
    assert lengths.tolist()[2] == 8192 + 128


def test_without_a_topk_all_columns_of_the_selection_count(target: Target) -> None:
    case = make_case(LayerType.C4A, [(400, 2)], 5, 0, target.device)
    assert case.topk_indices is not None
    out = torch.full((2, 256), POISON, dtype=torch.int32, device=target.device)
    lengths = torch.full((2,), POISON, dtype=torch.int32, device=target.device)
    combine_topk_swa_indices(
        case.topk_indices,
        case.positions,
        case.token_to_req,
        case.compressed_base,
        case.window_base,
        case.window_start,
        case.layer,
        out,
        lengths,
        backend=target.backend,
    )
    assert lengths.tolist() == [8 + 128] * 2
    assert out[:, :8].tolist() == case.topk_indices.tolist()  # the only request's rows start at 0


def test_no_tokens_write_nothing(target: Target) -> None:
    out, lengths = make_case(LayerType.C4A, [(5, 0)], 4, 0, target.device).run(target)
    assert out.shape[0] == lengths.shape[0] == 0


def test_wrong_arguments_are_refused_in_one_line() -> None:
    case = make_case(LayerType.C4A, [(400, 2)], 5, 0, "cpu")
    tokens = (case.positions, case.token_to_req, case.compressed_base, case.window_base, case.window_start, case.layer)
    lengths = torch.zeros(2, dtype=torch.int32)
    wide = torch.zeros(2, 256, dtype=torch.int32)
    for indices, out, topk in (
        (None, wide, 5),
        (case.topk_indices, wide, 9),
        (case.topk_indices, wide[:, :128], 5),
        (case.topk_indices, wide[:1], 5),
        (case.topk_indices, torch.zeros(2, 200, dtype=torch.int32), 5),
    ):
        with pytest.raises(UsageError) as error:
            combine_topk_swa_indices(indices, *tokens, out, lengths, topk)
        assert "\n" not in str(error.value)
