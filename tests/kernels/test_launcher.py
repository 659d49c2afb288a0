"""What a launch looks compiled kernels up by: whatever Triton compiles for must tell two launches apart."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from mla_tune.kernels.device.launcher import Launcher, launches_directly  # noqa: E402 -- needs triton


def _kernel(data_ptr, other_ptr, rows, width, stride, BLOCK) -> None:  # type: ignore[no-untyped-def]  # noqa: N803
    """Never compiled: the launcher reads its signature."""


_kernel.__annotations__["BLOCK"] = triton.language.constexpr
LAUNCHER = Launcher(triton.JITFunction(_kernel, do_not_specialize=["rows", "stride"]))
ALIGNED = torch.zeros(64)


def kinds(data: torch.Tensor | None, rows: int, width: int, other: torch.Tensor | None = None) -> tuple[object, ...]:
    return LAUNCHER._bind((data, other, rows, width, 1))[1]


def test_addresses_go_to_the_driver_and_numbers_as_they_are() -> None:
    found, _ = LAUNCHER._bind((ALIGNED, None, 7, 16, 1))
    assert found == [ALIGNED.data_ptr(), None, 7, 16, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((ALIGNED, 7, 16), (ALIGNED[1:], 7, 16)),
        ((ALIGNED, 7, 16), (ALIGNED.int(), 7, 16)),
        ((ALIGNED, 7, 16), (None, 7, 16)),
        ((ALIGNED, 7, 16), (ALIGNED, 7, 17)),
        ((ALIGNED, 7, 17), (ALIGNED, 7, 1)),
        ((ALIGNED, 7, 16), (ALIGNED, 7, 1 << 32)),
        ((ALIGNED, 7, 16), (ALIGNED, 1 << 32, 16)),
        ((ALIGNED[1:], 7, 16, ALIGNED), (ALIGNED, 7, 16, ALIGNED[1:])),
    ],
)
def test_launches_that_triton_compiles_apart_are_told_apart(one: tuple[object, ...], other: tuple[object, ...]) -> None:
    assert kinds(*one) != kinds(*other)  # type: ignore[arg-type]


def test_what_triton_does_not_compile_for_is_one_launch() -> None:
    assert kinds(ALIGNED, 7, 16) == kinds(ALIGNED[4:], 1, 32)
    assert kinds(ALIGNED, 16, 17) == kinds(ALIGNED, 15, 19)


def test_constants_out_of_order_are_refused_before_anything_is_launched() -> None:
    with pytest.raises(TypeError, match="constants of _kernel must be"):
        LAUNCHER._check_order((ALIGNED, None, 7, 16), {"BLOCK": 4})


@pytest.mark.parametrize(
    ("at", "tensor", "alike"),
    [
        (0, ALIGNED, True),
        (0, ALIGNED[4:], True),
        (0, ALIGNED[1:], False),
        (0, ALIGNED.int(), False),
        (1, ALIGNED, False),
    ],
)
def test_a_tensor_takes_the_place_of_another_only_where_triton_sees_no_difference(
    at: int, tensor: torch.Tensor, alike: bool
) -> None:
    bound = LAUNCHER.bind((1,), (ALIGNED, None, 7, 16, 1), {"BLOCK": 4}, 4)
    assert bound._alike(((at, tensor),)) is alike
    assert (bound._with(((at, tensor),)).kinds == bound.kinds) is alike


@pytest.mark.parametrize(
    ("release", "known"),
    [("3.5.1", False), ("3.6.0", True), ("3.9.0+git1", True), ("3.10.0", False), ("4.0.0", False)],
)
def test_a_release_of_triton_whose_private_interface_nobody_read_launches_its_own_way(
    release: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launches_directly(release) is known
    monkeypatch.setattr(triton, "__version__", release)
    assert Launcher(triton.JITFunction(_kernel)).only_through_triton is not known
