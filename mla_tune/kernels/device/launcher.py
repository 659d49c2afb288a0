# mypy: disable-error-code="import-untyped"
"""Launches Triton kernels with little work on the host.

Triton's own launch binds every argument to its name, builds a key of strings from all of them and asks the driver about
every pointer: 119 us on the host of an H100 for the fused preparation, which has 48 arguments. The launch here takes 17 us
on the host of an H200 where the arguments are bound once, and 37 us with everything before it where they are not
(``scripts/bench_kernels``). Its key is a tuple of what Triton specializes on: dtypes, alignment to 16 bytes, integers that
are 1, multiples of 16 or wider than 32 bits, and the constants. A kernel that was compiled for the key is launched by
address. The first launch of a key goes through Triton.

Launching by address uses Triton's private interface (``CompiledKernel.run``, ``function`` and ``packed_metadata``). It was
read in the releases of :data:`KNOWN_TRITON`, and a test compiles a kernel and compares both ways; in any other release
every launch goes through Triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import triton

Argument: TypeAlias = "torch.Tensor | int | None"
_ALIGNMENT = 16
"""Bytes, and units of an integer, whose multiples Triton compiles for."""
_WIDE = 1 << 31
KNOWN_TRITON = ((3, 6), (3, 10))
"""Releases of Triton whose private launch interface is used: from the first up to, but not including, the second."""


def launches_directly(release: str) -> bool:
    """Whether kernels may be launched by address in this release of Triton."""
    major, minor = release.split(".")[:2]
    return KNOWN_TRITON[0] <= (int(major), int(minor)) < KNOWN_TRITON[1]


class Launcher:
    """Launches one kernel: ``launcher(grid, arguments, constants, num_warps)``.

    ``arguments`` are tensors, integers from 0 up and None in the kernel's order, ``constants`` all of its
    ``tl.constexpr``, in that order too. Any error is Triton's. The kernel runs on the current device and stream, as
    Triton's own launch does.
    """

    def __init__(self, kernel: Any) -> None:
        """``kernel`` is a function that ``triton.jit`` made, its pointers called ``*_ptr``."""
        self._kernel = kernel
        self._compiled: dict[tuple[object, ...], Any] = {}
        self._names: tuple[str, ...] = ()
        # The interpreter's functions are no JITFunction: it has nothing to compile.
        if isinstance(kernel, triton.JITFunction) and launches_directly(triton.__version__):
            self._names = tuple(kernel.arg_names)
            values = [(at, p) for at, p in enumerate(kernel.params) if not p.is_constexpr]
            self._pointers = [at for at, parameter in values if parameter.name.endswith("_ptr")]
            numbers = [(at, parameter) for at, parameter in values if not parameter.name.endswith("_ptr")]
            self._plain = [at for at, parameter in numbers if parameter.do_not_specialize]
            self._specialized = [at for at, parameter in numbers if not parameter.do_not_specialize]

    def __call__(
        self, grid: tuple[int, ...], arguments: tuple[Argument, ...], constants: Mapping[str, Any], num_warps: int
    ) -> None:
        """Launch ``grid`` (one to three sizes) programs of ``num_warps`` warps."""
        if self._names:
            addresses, kinds = self._bind(arguments)
            values, device = tuple(constants.values()), triton.runtime.driver.active.get_current_device()
            compiled = self._compiled.get((kinds, num_warps, device, values))
            if compiled is not None:
                _run(compiled, device, (*grid, 1, 1)[:3], addresses, values)
                return
        self.bind(grid, arguments, constants, num_warps)()

    def bind(
        self, grid: tuple[int, ...], arguments: tuple[Argument, ...], constants: Mapping[str, Any], num_warps: int
    ) -> BoundLaunch:
        """The same launch, to be made any number of times while the memory of its tensors stays theirs."""
        return BoundLaunch(
            self, grid, arguments, constants, num_warps, *(self._bind(arguments) if self._names else ([], ()))
        )

    def compiled(self, bound: BoundLaunch, device: int) -> Any:
        """What Triton compiled for ``bound``; None if it did not yet."""
        return self._compiled.get((bound.kinds, bound.num_warps, device, bound.values))

    def through_triton(self, bound: BoundLaunch) -> None:
        """Triton's own launch. What it compiled is kept where kernels are launched by address."""
        if not self._names:
            self._kernel[bound.grid](*bound.arguments, **bound.constants, num_warps=bound.num_warps)
            return
        self._check_order(bound.arguments, bound.constants)
        device = triton.runtime.driver.active.get_current_device()
        compiled = self._kernel[bound.grid](*bound.arguments, **bound.constants, num_warps=bound.num_warps)
        self._compiled[bound.kinds, bound.num_warps, device, bound.values] = compiled

    @property
    def only_through_triton(self) -> bool:
        """Whether every launch is Triton's own: in its interpreter, and in a release that is not known."""
        return not self._names

    def _bind(self, arguments: tuple[Argument, ...]) -> tuple[list[Any], tuple[object, ...]]:
        """Arguments as the driver takes them, and what Triton compiles for: a third of a launch's time on the host."""
        found: list[Any] = [a if a is None or type(a) is int else a.data_ptr() for a in arguments]  # type: ignore[union-attr]
        kinds = [a if a is None else False if type(a) is int else a.dtype for a in arguments]  # type: ignore[union-attr]
        bits = 0
        for at in self._pointers:
            bits |= found[at] or 0
        if bits % _ALIGNMENT:  # rare, and only then it matters which one is not aligned
            kinds += [(found[at] or 0) % _ALIGNMENT for at in self._pointers]
        for at in self._plain:
            if found[at] >= _WIDE:
                kinds.append(at)
        kinds += [_integer_kind(found[at]) for at in self._specialized]
        return found, tuple(kinds)

    def _check_order(self, arguments: tuple[Argument, ...], constants: Mapping[str, Any]) -> None:
        """A mistake in a launch function of this folder; without it constants would change places unseen."""
        expected = self._names[len(arguments) :]
        if tuple(constants) != expected:
            raise TypeError(f"constants of {self._kernel.__name__} must be {expected}: got {tuple(constants)}")


class BoundLaunch:
    """A launch whose arguments were looked at once; :meth:`Launcher.bind` makes it.

    What the layers of a forward share is not bound again at each of them: a layer gives the few tensors of its own.
    """

    __slots__ = (
        "_addresses",
        "_compiled",
        "_launcher",
        "arguments",
        "constants",
        "grid",
        "kinds",
        "num_warps",
        "values",
    )

    def __init__(
        self,
        launcher: Launcher,
        grid: tuple[int, ...],
        arguments: tuple[Argument, ...],
        constants: Mapping[str, Any],
        num_warps: int,
        addresses: list[Any],
        kinds: tuple[object, ...],
    ) -> None:
        self._launcher, self._addresses, self.kinds = launcher, addresses, kinds
        self._compiled: dict[int, Any] = {}
        self.arguments, self.constants, self.values = arguments, constants, tuple(constants.values())
        self.grid, self.num_warps = (*grid, 1, 1)[:3], num_warps

    def __call__(self, changed: tuple[tuple[int, torch.Tensor], ...] = ()) -> None:
        """Launch, with the tensors ``changed`` in the place of those bound at their positions."""
        launcher = self._launcher
        if changed and (launcher.only_through_triton or not self._alike(changed)):
            self._with(changed)()
            return
        if launcher.only_through_triton:
            launcher.through_triton(self)
            return
        device = triton.runtime.driver.active.get_current_device()
        compiled = self._compiled.get(device) or launcher.compiled(self, device)
        if compiled is None:
            launcher.through_triton(self._with(changed) if changed else self)
            return
        self._compiled[device] = compiled
        addresses = self._addresses
        if changed:
            addresses = addresses.copy()
            for at, tensor in changed:
                addresses[at] = tensor.data_ptr()
        _run(compiled, device, self.grid, addresses, self.values)

    def _alike(self, changed: tuple[tuple[int, torch.Tensor], ...]) -> bool:
        """Whether Triton sees no difference: the same dtypes, and addresses as well aligned."""
        return all(
            tensor.dtype is self.kinds[at] and (tensor.data_ptr() ^ self._addresses[at]) % _ALIGNMENT == 0
            for at, tensor in changed
        )

    def _with(self, changed: tuple[tuple[int, torch.Tensor], ...]) -> BoundLaunch:
        arguments = list(self.arguments)
        for at, tensor in changed:
            arguments[at] = tensor
        return self._launcher.bind(self.grid, tuple(arguments), self.constants, self.num_warps)


def _run(
    compiled: Any, device: int, grid: tuple[int, ...], addresses: Sequence[Any], values: tuple[object, ...]
) -> None:
    """Launch on the current stream, as Triton does. Its hooks, which profilers set, are left out to save time."""
    stream, no_hooks = triton.runtime.driver.active.get_current_stream(device), (None, None, None)
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, *no_hooks, *addresses, *values)


def _integer_kind(value: int) -> int:
    """What Triton sees of an integer that it compiles for: its width, whether it is 1, or a multiple of 16."""
    return (4 if value >= _WIDE else 0) | (2 if value == 1 else int(value % _ALIGNMENT == 0))
