"""SGLang's kernels as stages of our candidates: the wheel's own Triton kernels, in Triton's interpreter.

They have to pass the check that ours pass. The top-k transforms are compiled for a GPU: SGLang's own torch versions of
them stand in, so that what is tested is how they are wired, not how they run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch

from mla_tune.kernels.adapters import provided, sglang_kernels
from mla_tune.kernels.backend import Backend
from mla_tune.kernels.dequantize import dequantize_k_cache_paged
from mla_tune.kernels.inputs import InputBuilder, PagedCache
from mla_tune.kernels.workspace import SparseWorkspace
from mla_tune.sites.candidates import names_at
from mla_tune.sites.launch_parameters import DEFAULT_LAUNCHES
from mla_tune.sites.provider import Provider
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import MODELS, Conditions, LayerType, Site, SiteName
from mla_tune.store.measurement import Measurement, Outcome
from mla_tune.sweep.grid import Point
from mla_tune.sweep.worker.messages import Task
from mla_tune.sweep.worker.point_measurer import PointMeasurer

RELEASE = version("sglang")
HERE = Provider("sglang", RELEASE)
TRANSFORMS = Provider("sglang", RELEASE, "0.4.10")
FLASH, V3_2 = MODELS["deepseek-v4-flash"], MODELS["deepseek-v3.2"]
LAYERS = [LayerType.SWA_ONLY, LayerType.C4A, LayerType.C128A, LayerType.DSA]
SHAPE = Shape(2, 5, 4600)
"""Two requests, whose contexts hold more rows of c4a (575 each) and dsa (2300) than the top-k."""


def site_of(layer: LayerType, provider: Provider = HERE) -> Site:
    model = V3_2 if layer is LayerType.DSA else FLASH
    return Conditions(provider=provider).at(model.site(SiteName.PREFILL_ATTENTION, layer, 64))


def checked(site: Site, shape: Shape = SHAPE) -> dict[str, Measurement]:
    """What the comparison with the reference says of every candidate."""
    task = Task(Point(site, shape), names_at(site), timed=False)
    rows = PointMeasurer("cpu", seed=3).measure(task, lambda _: None)
    return {row.candidate: row for row in rows}


def test_its_kernels_are_offered_with_their_release_and_what_is_left_out() -> None:
    found = sglang_kernels.installed("cpu")
    assert isinstance(found, sglang_kernels.FoundKernels)
    assert found.provider == HERE
    assert found.left_out == "stage topk_transform is left out: its kernels are compiled for a GPU"


def test_without_the_interpreter_a_cpu_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    sglang_kernels._lacking.cache_clear()
    found = sglang_kernels.installed("cpu")
    sglang_kernels._lacking.cache_clear()
    assert isinstance(found, sglang_kernels.Missing)
    assert found.reason.startswith(
        "--provider sglang needs SGLang's kernels: they run on a GPU, and this device is the CPU;"
    )


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("shape", [Shape(2, 5, 900), Shape(1, 3, 90)], ids=str)
def test_its_kernels_give_the_references_attention(layer: LayerType, shape: Shape) -> None:
    rows = checked(site_of(layer), shape)
    assert {name: (row.outcome, row.detail) for name, row in rows.items()} == {
        "sparse_fwd": (Outcome.OK, ""),
        "with_kvcache": (Outcome.OK, ""),
    }


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_kernel_of_its_that_leaves_rows_unwritten_is_found(layer: LayerType, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(_cache: object) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        return lambda _slots, out: out

    monkeypatch.setattr(sglang_kernels, "rows", untouched)
    assert checked(site_of(layer), Shape(2, 5, 900))["sparse_fwd"].outcome is Outcome.WRONG_RESULT


@pytest.mark.parametrize(
    ("provider", "installed", "reason"),
    [
        (Provider("sglang", "0.4.0"), "", f"sglang 0.4.0 is not here: this is sglang {RELEASE}"),
        (TRANSFORMS, "0.4.9", "sglang-kernel 0.4.10 is not here: this is 0.4.9"),
        (TRANSFORMS, "", "sglang-kernel 0.4.10 is not here: it is not installed"),
    ],
)
def test_another_release_than_the_measured_one_is_unsupported_with_the_reason(
    provider: Provider, installed: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_kernels, "_kernels_version", lambda: installed)
    sglang_kernels.missing.cache_clear()
    row = checked(site_of(LayerType.C4A, provider))["sparse_fwd"]
    sglang_kernels.missing.cache_clear()
    assert (row.outcome, row.detail) == (Outcome.UNSUPPORTED, reason)


def test_its_compiled_schedule_is_unsupported_without_a_gpu_and_deep_gemms_is_not() -> None:
    site = Conditions(provider=HERE).at(FLASH.site(SiteName.INDEXER_METADATA, LayerType.C4A))
    outcomes = {name: row.outcome for name, row in checked(site).items()}
    assert outcomes == {"deep_gemm": Outcome.OK, "jit": Outcome.UNSUPPORTED}


def our_rows(cache: PagedCache) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Our torch version of the dequantize kernel."""

    def run(slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        dequantize_k_cache_paged(cache.data, slots, out, cache.fmt, cache.page_size, backend=Backend.TORCH)
        return out

    return run


@pytest.fixture
def torch_transforms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """SGLang's torch versions in the place of its compiled transforms; the names of those that were called."""
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import _topk_unfused
    from sglang.srt.layers.attention.dsv4.indexer import topk_transform_pytorch_vectorized

    called: list[str] = []
    monkeypatch.setattr(sglang_kernels, "rows", our_rows)  # thousands of rows in the interpreter would take a minute

    def paged(scores: Any, lens: Any, tables: Any, slots: Any, page_size: int, _plan: Any, raw: Any) -> None:
        called.append("paged")
        topk_transform_pytorch_vectorized(scores, lens, tables, slots, page_size, raw)

    def ragged(scores: Any, lens: Any, *, out_offsets: Any, out_indices: Any, row_starts: Any) -> None:
        called.append("ragged")
        found = _topk_unfused(scores, lens, out_indices.shape[1], row_starts)
        out_indices.copy_(torch.where(found >= 0, found + out_offsets[:, None], -1))

    def fused(scores: Any, lens: Any, tokens: Any, extends: Any, topk: int, row_starts: Any) -> torch.Tensor:
        called.append("fused")
        found = _topk_unfused(scores, lens, topk, row_starts)
        request = torch.bucketize(torch.arange(len(scores)), extends[1:], right=True)
        slots = tokens[request].gather(1, found.clamp_min(0).long())
        return torch.where(found >= 0, slots, -1).int()

    stand_ins: dict[str, Any] = {
        "topk_transform_paged_v2": paged,
        "plan_topk_v2": lambda lens: lens,
        "topk_transform_ragged_v2": ragged,
        "fast_topk_transform_fused": fused,
    }
    monkeypatch.setattr(sglang_kernels, "_kernels_version", lambda: TRANSFORMS.kernels)
    real = sglang_kernels._imported
    monkeypatch.setattr(sglang_kernels, "_imported", lambda module, name: stand_ins.get(name) or real(module, name))
    return called


@pytest.mark.parametrize(
    ("layer", "kernels"), [(LayerType.C4A, {"paged"}), (LayerType.DSA, {"ragged", "fused"})], ids=str
)
@pytest.mark.parametrize("shape", [SHAPE, Shape(3, 4, 40)], ids=str)
def test_both_paths_attend_to_what_the_transform_selected(
    layer: LayerType, kernels: set[str], shape: Shape, torch_transforms: list[str]
) -> None:
    rows = checked(site_of(layer, TRANSFORMS), shape)
    assert {name: (row.outcome, row.detail) for name, row in rows.items()} == {
        "sparse_fwd": (Outcome.OK, ""),
        "with_kvcache": (Outcome.OK, ""),
    }
    assert set(torch_transforms) == kernels


@pytest.mark.parametrize("layer", [LayerType.C4A, LayerType.DSA], ids=str)
@pytest.mark.usefixtures("torch_transforms")
def test_the_scores_have_the_inputs_selection_as_their_top_k(layer: LayerType) -> None:
    inputs = InputBuilder(torch.device("cpu"), seed=5).attention(site_of(layer, TRANSFORMS), SHAPE)
    assert inputs.topk_indices is not None
    expected = inputs.selections()[-1].slot_ids
    found = provided.selections(inputs)
    assert found.transform is not None
    found.transform()
    assert torch.equal(found.parts[-1].slot_ids.sort().values, expected.sort().values)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.usefixtures("torch_transforms")
def test_what_a_captured_graph_goes_on_reading_stays_alive(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = InputBuilder(torch.device("cpu"), seed=5).attention(site_of(LayerType.DSA, TRANSFORMS), SHAPE)
    found = provided.selections(inputs)
    bound = SparseWorkspace(inputs, None, DEFAULT_LAUNCHES, split=inputs.work.compressed_rows, combines=False)
    monkeypatch.setattr(sglang_kernels, "rows", lambda _cache: lambda _slots, out: out.clone())
    dequantize = provided.sparse_fwd_runs(bound)["dequantize_compressed"]
    assert found.transform is not None
    monkeypatch.setattr(provided, "_is_captured", lambda _tensor: captured)
    read = []
    for _ in range(2):
        found.transform()
        dequantize()
        read += [weakref.ref(found.parts[-1].slot_ids), weakref.ref(bound.workspace)]
    assert [tensor() is not None for tensor in read] == [captured, captured, True, True]


@pytest.mark.parametrize("layer", [LayerType.C4A, LayerType.DSA], ids=str)
def test_a_transform_that_selects_other_rows_is_found(
    layer: LayerType, torch_transforms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = InputBuilder._scores
    monkeypatch.setattr(InputBuilder, "_scores", lambda *args: -build(*args))  # its top-k are the rows left out
    rows = checked(site_of(layer, TRANSFORMS))
    assert {row.outcome for row in rows.values()} == {Outcome.WRONG_RESULT}
    assert torch_transforms
