"""Candidates that are broken on purpose, one of each kind: ``sparse_fwd`` whose attention stage misbehaves.

A worker that imports this module has them all. On a GPU the illegal access, the hang and the exhausted memory are real ones
of the GPU.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mla_tune.kernels import binding
from mla_tune.kernels.binding import Device
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepared import BoundStage, PreparedPath

Run = Callable[[], object]
Misbehave = Callable[[PreparedPath, Run, Device], None]
"""Runs the honest attention stage (the second argument), or not, and does its harm."""

FOREVER_S = 3600.0
FIRST_CALL_S = 1.2
"""What each new shape costs the slow one: above the second that a served candidate may take."""


def raises(prepared: PreparedPath, run: Run, device: Device) -> None:
    raise RuntimeError("the launch was refused\nwith a second line")


def aborts(prepared: PreparedPath, run: Run, device: Device) -> None:
    os.write(2, b"terminate called: an invariant of the kernel does not hold\n")
    os.abort()


def aborts_above_9(prepared: PreparedPath, run: Run, device: Device) -> None:
    run()
    if prepared.result().shape[0] > 9:
        aborts(prepared, run, device)


def reads_illegal_memory(prepared: PreparedPath, run: Run, device: Device) -> None:
    run()
    if device.kind == "cpu":
        ctypes.string_at(0)
    from tests.sweep.hostile_kernels import store_far_away

    store_far_away[(1,)](prepared.result())


def is_killed(prepared: PreparedPath, run: Run, device: Device) -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does to a process when memory runs out


def hangs(prepared: PreparedPath, run: Run, device: Device) -> None:
    if device.kind == "cpu":
        time.sleep(FOREVER_S)
    torch.cuda._sleep(10**12)  # type: ignore[no-untyped-call]  # GPU cycles: minutes
    torch.cuda.synchronize()


def exhausts_memory(prepared: PreparedPath, run: Run, device: Device) -> None:
    torch.empty(1 << 50, dtype=torch.uint8, device=device.kind)


def is_wrong(prepared: PreparedPath, run: Run, device: Device) -> None:
    run()
    prepared.result().mul_(1.1)


def leaves_a_row_unwritten(prepared: PreparedPath, run: Run, device: Device) -> None:
    run()
    right = prepared.result().clone()
    poison = torch.full_like(right, float("nan"))
    prepared.output.tensor = None
    del poison  # the next allocation of this size finds it, as after the judge's own poison
    output = torch.empty_like(right)
    output[:-1] = right[:-1]
    prepared.output.tensor = output


def is_slow_at_first(prepared: PreparedPath, run: Run, device: Device) -> None:
    key = (prepared.candidate, tuple(prepared.buffers[0].shape))
    if key not in _SEEN:
        _SEEN.add(key)
        time.sleep(FIRST_CALL_S)
    run()


def is_noisy(prepared: PreparedPath, run: Run, device: Device) -> None:
    run()
    if device.kind == "cpu":
        time.sleep(random.uniform(0, 0.03))
        return
    from tests.sweep.hostile_kernels import spin

    if "dice" not in _DICE:
        _DICE["dice"] = torch.tensor([random.getrandbits(30)], device="cuda")
    spin[(1,)](_DICE["dice"])  # how long it takes is drawn on the GPU: a replayed graph is as noisy


def is_flaky(prepared: PreparedPath, run: Run, device: Device) -> None:
    run()
    _CALLS[0] += 1
    if _CALLS[0] > 1 and not _capturing(device):
        prepared.result().neg_()


def fails_when_it_is_timed(prepared: PreparedPath, run: Run, device: Device) -> None:
    run()
    _CALLS[0] += 1
    if _CALLS[0] > 1:
        raise RuntimeError("works once")


_DICE: dict[str, torch.Tensor] = {}
_SEEN: set[object] = set()
_CALLS = [0]

KINDS: dict[str, Misbehave] = {
    "raises": raises,
    "aborts": aborts,
    "illegal_access": reads_illegal_memory,
    "killed": is_killed,
    "hangs": hangs,
    "out_of_memory": exhausts_memory,
    "wrong": is_wrong,
    "unwritten_row": leaves_a_row_unwritten,
    "slow_first_call": is_slow_at_first,
    "noisy": is_noisy,
    "flaky": is_flaky,
    "works_once": fails_when_it_is_timed,
}


def _capturing(device: Device) -> bool:
    return device.kind == "cuda" and torch.cuda.is_current_stream_capturing()


def _prepare(misbehave: Misbehave, inputs: AttentionInputs, device: Device) -> PreparedPath:
    honest = binding.prepare_attention(inputs, "sparse_fwd", device)
    _CALLS[0] = 0

    def broken(bound: BoundStage) -> BoundStage:
        run = bound.run
        return replace(bound, run=lambda: misbehave(honest, run, device)) if bound.stage.name == "attention" else bound

    return replace(honest, stages=tuple(broken(bound) for bound in honest.stages))


for _name, _misbehave in {**KINDS, "aborts_above_9": aborts_above_9}.items():
    binding.add(_name, lambda inputs, device, misbehave=_misbehave: _prepare(misbehave, inputs, device))  # type: ignore[misc]
