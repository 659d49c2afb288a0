"""Where sglang is installed its kernels give what ours do; where it is not, the adapter says so in one line."""

import importlib.util

import pytest
import torch

from mla_tune.kernels import cases
from mla_tune.kernels.adapters import sglang_kernels
from mla_tune.kernels.backend import Backend
from mla_tune.kernels.binding import Device
from mla_tune.kernels.cases import KernelCase
from mla_tune.kernels.inputs import InputBuilder
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, Site, SiteName

installed = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="sglang is not installed")
C4A = Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 64)
DSA = Site(SiteName.PREFILL_ATTENTION, LayerType.DSA, 64, 64)


def assert_same(case: KernelCase, other: sglang_kernels.BoundKernel | sglang_kernels.Missing) -> None:
    assert isinstance(other, sglang_kernels.BoundKernel), other
    case.run(None, Backend.TORCH)
    for mine, theirs in zip(case.outputs, other.run(), strict=False):
        # Triton's interpreter, which stands in for a GPU, truncates to bf16.
        torch.testing.assert_close(theirs, mine, rtol=2.0**-7 if mine.is_floating_point() else 0.0, atol=0.0)


@installed
@pytest.mark.parametrize("site", [C4A, DSA], ids=lambda site: str(site.layer))
def test_its_dequantize_kernels_take_our_caches(site: Site, device: str) -> None:
    inputs = InputBuilder(torch.device(device)).attention(site, Shape(2, 2, 60 * site.layer.compress_ratio))
    assert_same(cases.dequantize_case(inputs), sglang_kernels.dequantize(inputs))


@installed
@pytest.mark.parametrize("shape", [Shape(1, 3, 900), Shape(3, 7, 2000), Shape(2, 5, 5)])
def test_its_combine_kernel_gives_our_indices(shape: Shape, device: str) -> None:
    inputs = InputBuilder(torch.device(device)).attention(C4A, shape)
    assert_same(cases.combine_case(inputs), sglang_kernels.combine(inputs))


@installed
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 128, 5000, 32768])
def test_its_metadata_kernel_gives_our_schedule(rows: int) -> None:
    sms = Device.current("cuda").sm_count
    lens = InputBuilder(torch.device("cuda")).context_lens(C4A, Shape(1, rows, max(rows, 131072)))
    assert_same(cases.metadata_case(lens, sms), sglang_kernels.metadata(lens, sms))


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="sglang is installed")
def test_without_sglang_the_reason_is_one_line() -> None:
    inputs = InputBuilder(torch.device("cpu")).attention(C4A, Shape(1, 1, 100))
    for found in (sglang_kernels.dequantize(inputs), sglang_kernels.combine(inputs)):
        assert isinstance(found, sglang_kernels.Missing)
        assert "No module named 'sglang'" in found.reason
        assert "\n" not in found.reason
