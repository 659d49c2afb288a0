import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mla_tune.errors import UsageError
from mla_tune.kernels.combine import combine_topk_swa_indices
from mla_tune.kernels.select import compact_selected, mark_selected, most_selected_rows
from mla_tune.sites.launch_parameters import SelectConfig
from mla_tune.sites.site import LayerType
from tests.conftest import Target
from tests.kernels.test_combine import REQUESTS, Case, make_case

CONFIGS = [None, SelectConfig(1, 64, 32, 1), SelectConfig(8, 128, 256, 2)]


def selected_rows(case: Case, layer: LayerType) -> set[int]:
    """Workspace rows that some query selects, one query at a time."""
    assert case.topk_indices is not None
    assert case.topk is not None
    found: set[int] = set()
    for token, (position, request) in enumerate(zip(case.positions.tolist(), case.token_to_req.tolist(), strict=True)):
        count = min(case.topk, (position + 1) // layer.compress_ratio)
        base = int(case.compressed_base[request])
        found |= {base + index for index in case.topk_indices[token, :count].tolist() if index >= 0}
    return found


@pytest.mark.parametrize("layer", [LayerType.C4A, LayerType.DSA])
@given(
    requests=REQUESTS,
    topk=st.sampled_from([1, 5, 64, 130]),
    seed=st.integers(0, 99),
    config=st.sampled_from(CONFIGS),
)
@example(requests=[(0, 1)], topk=5, seed=0, config=None)
@example(requests=[(0, 0)], topk=5, seed=0, config=None)
@settings(max_examples=10)
def test_selected_rows_get_consecutive_places_and_indices_lead_to_them(
    target: Target,
    layer: LayerType,
    requests: list[tuple[int, int]],
    topk: int,
    seed: int,
    config: SelectConfig | None,
) -> None:
    case = make_case(layer, requests, topk, seed, target.device)
    assert case.topk_indices is not None
    num_rows = 500 + int(case.compressed_base.max())  # the selection's indices go to 499
    marks = torch.zeros(num_rows, dtype=torch.uint8, device=target.device)
    count = torch.full((1,), 9, dtype=torch.int32, device=target.device)
    row_slots = torch.randperm(num_rows, dtype=torch.int32).to(target.device)
    row_map = torch.full((num_rows,), -77, dtype=torch.int32, device=target.device)
    most = most_selected_rows(num_rows, len(case.positions), topk)
    slots = torch.full((most,), -77, dtype=torch.int32, device=target.device)
    tokens = (case.topk_indices, case.positions, case.token_to_req, case.compressed_base)
    for _ in range(2):  # the second layer finds what the first one left
        mark_selected(*tokens, marks, count, layer, topk, config, target.backend)
        compact_selected(marks, row_slots, row_map, slots, count, config, target.backend)
    expected = selected_rows(case, layer)
    places = {row: int(row_map[row]) for row in expected}
    assert sorted(places.values()) == list(range(len(expected)))
    assert int(count) == len(expected)
    assert all(int(slots[place]) == int(row_slots[row]) for row, place in places.items())
    assert not marks.any()
    assert_indices_lead_to(case, target, row_map)


def assert_indices_lead_to(case: Case, target: Target, row_map: torch.Tensor) -> None:
    """The combined indices with a map are those without it, sent through it; the window stays as it is."""
    plain, lengths = case.run(target)
    mapped = torch.full_like(plain, -77)
    tokens = (case.topk_indices, case.positions, case.token_to_req)
    bases = (case.compressed_base, case.window_base, case.window_start)
    combine_topk_swa_indices(
        *tokens, *bases, case.layer, mapped, lengths, case.topk, backend=target.backend, row_map=row_map
    )
    window = lengths - (case.positions + 1).clamp_max(128) if case.layer.has_window else lengths
    is_selection = torch.arange(plain.shape[1], device=plain.device) < window[:, None]
    through = torch.where(plain >= 0, row_map[plain.clamp(0, len(row_map) - 1).long()], -1)
    assert torch.equal(mapped, torch.where(is_selection, through, plain))


def test_wrong_arguments_are_refused_in_one_line() -> None:
    case = make_case(LayerType.C4A, [(400, 2)], 5, 0, "cpu")
    assert case.topk_indices is not None
    tokens = (case.positions, case.token_to_req, case.compressed_base)
    marks, count = torch.zeros(600, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    for indices, mark, number, topk in (
        (case.topk_indices.long(), marks, count, 5),
        (case.topk_indices, marks, count, 9),
        (case.topk_indices, marks.int(), count, 5),
        (case.topk_indices, marks, count.long(), 5),
        (case.topk_indices[:1], marks, count, 5),
    ):
        with pytest.raises(UsageError) as error:
            mark_selected(indices, *tokens, mark, number, LayerType.C4A, topk)
        assert "\n" not in str(error.value)
    rows = torch.zeros(600, dtype=torch.int32)
    for slots, row_map, selected in ((rows[:5], rows, rows), (rows, rows.long(), rows), (rows, rows, rows.long())):
        with pytest.raises(UsageError) as error:
            compact_selected(marks, slots, row_map, selected, count)
        assert "\n" not in str(error.value)
