"""One trial of a kernel's launch parameters, in the worker: check its output, then time it in turn with the default.

Correct before fast: a configuration whose output differs from that of the torch implementation, or leaves some of it
unwritten, is not timed. The torch implementations are held to the plain references by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mla_tune.bench.sampling import Effort
from mla_tune.bench.timing import TimedWork, Timer
from mla_tune.kernels.backend import Backend
from mla_tune.kernels.binding import Device
from mla_tune.kernels.cases import KernelCase, kernel_case
from mla_tune.kernels.inputs import InputBuilder
from mla_tune.sites.launch_parameters import Config
from mla_tune.store.measurement import Outcome
from mla_tune.sweep.worker.failure import failure_of
from mla_tune.sweep.worker.messages import Trial, Tried

_ROUNDING = 2.0**-7
"""Relative difference of one bf16 rounding step: Triton's interpreter truncates where a GPU rounds."""


@dataclass(frozen=True, slots=True)
class _Checked:
    """The case of the last trial, kept for the next one: its inputs, and what its outputs should be."""

    kernel: str
    size: int
    case: KernelCase
    expected: tuple[torch.Tensor, ...]


class KernelTrials:
    """Runs trials on one device. Inputs of a kernel and size are built once."""

    def __init__(self, device: Device, builder: InputBuilder, timer: Timer, effort: Effort) -> None:
        self._device, self._builder, self._timer, self._effort = device, builder, timer, effort
        self._checked: _Checked | None = None

    def run(self, trial: Trial) -> Tried:
        """What becomes of ``trial``. Raises :class:`DeviceLostError` where it takes the device's context with it."""
        try:
            checked = self._case(trial.kernel, trial.size)
            for config in (trial.default, trial.config):
                wrong = self._wrong(checked, config)
                if wrong is not None:
                    return Tried(Outcome.WRONG_RESULT, wrong)
            return self._time(checked.case, trial)
        except Exception as error:  # a kernel may raise anything at any of these steps; it must cost its own trial only
            found = failure_of(error, self._device.kind)
            return Tried(found.outcome, " ".join(found.detail.split()))

    def _case(self, kernel: str, size: int) -> _Checked:
        kept = self._checked
        if kept is None or (kept.kernel, kept.size) != (kernel, size):
            self._checked = None
            self._builder.release()
            case = kernel_case(kernel, size, self._builder, self._device.sm_count)
            case.run(None, Backend.TORCH)
            expected = tuple(case.canonical(tensor).clone() for tensor in case.outputs)
            kept = self._checked = _Checked(kernel, size, case, expected)
        return kept

    def _wrong(self, checked: _Checked, config: Config) -> str | None:
        case = checked.case
        for tensor in case.outputs:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
        case.run(config, Backend.TRITON)
        found = [case.canonical(tensor) for tensor in case.outputs]
        return next((why for pair in zip(found, checked.expected, strict=True) if (why := _difference(*pair))), None)

    def _time(self, case: KernelCase, trial: Trial) -> Tried:
        works = [TimedWork(_bound(case, config)) for config in (trial.config, trial.default)]
        taken, default = self._timer.measure(works, replace(self._effort, max_samples=trial.samples))
        if not taken.samples_us:
            reasons = "; ".join(reason for reason, _ in taken.quarantined)
            return Tried(Outcome.DISTURBED, f"no undisturbed samples: {reasons}")
        return Tried(Outcome.OK, "", taken.samples_us, default.samples_us)


def _bound(case: KernelCase, config: Config) -> Callable[[], None]:
    return lambda: case.run(config, Backend.TRITON)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Why ``found`` is not ``expected``, by the first row that differs; None if it is."""
    if found.shape != expected.shape:
        return f"{found.shape[0]} rows instead of {expected.shape[0]}"
    for start in range(0, len(found), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        wrong = _wrong_rows(found[rows], expected[rows])
        if wrong:
            return f"row {start + wrong[0]} differs from the torch implementation's"
    return None


_ROWS_AT_ONCE = 1 << 17
"""Bounds the temporaries of a comparison to some hundred MB."""


def _wrong_rows(found: torch.Tensor, expected: torch.Tensor) -> Sequence[int]:
    close = torch.isclose(found, expected, rtol=_ROUNDING if found.is_floating_point() else 0.0, atol=0.0)
    first: list[int] = (~close.reshape(len(found), -1).all(dim=1)).nonzero().flatten()[:1].tolist()
    return first
