"""A candidate bound to the inputs of one point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mla_tune.sites.stages import Amortization, Stage

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class BoundStage:
    """One stage ready to run. ``baseline`` is what to subtract where the stage cannot be launched on its own."""

    stage: Stage
    run: Run
    baseline: Run | None = None


@dataclass(slots=True)
class Output:
    """The last result of a candidate; stages assign it because FlashMLA allocates its own outputs."""

    tensor: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class PreparedPath:
    """A candidate's stages in running order, its kept buffers, and its output once they ran."""

    candidate: str
    stages: tuple[BoundStage, ...]
    output: Output
    buffers: Sequence[torch.Tensor] = field(default=())
    """What it keeps between calls (workspace, indices, schedule): the fixed part of its workspace bytes."""
    scratch: Sequence[torch.Tensor] = field(default=())
    """Those of them that every run writes before it reads them."""

    def per_layer(self) -> tuple[BoundStage, ...]:
        """Stages of one layer."""
        return tuple(s for s in self.stages if s.stage.amortization is Amortization.PER_LAYER)

    def per_forward(self) -> tuple[BoundStage, ...]:
        """Stages that run once per forward, or once per forward and layer type."""
        return tuple(s for s in self.stages if s.stage.amortization is not Amortization.PER_LAYER)

    def run(self) -> None:
        """Run every stage once, in order."""
        for bound in self.stages:
            bound.run()

    def poison(self) -> None:
        """Make what a stage leaves unwritten show: NaN in the scratch buffers, 0 where they hold integers.

        Integers are row numbers and lengths: 0 makes the next stage read the wrong rows, but none outside its input.
        """
        for buffer in self.scratch:
            buffer.fill_(float("nan") if buffer.is_floating_point() else 0)

    def result(self) -> torch.Tensor:
        """The output of the last run."""
        if self.output.tensor is None:
            raise RuntimeError(f"{self.candidate} has not run yet")
        return self.output.tensor

    def buffer_bytes(self) -> int:
        """Bytes of the kept buffers."""
        return sum(buffer.nbytes for buffer in self.buffers)
