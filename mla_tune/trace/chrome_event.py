"""One event of a Chrome trace as torch.profiler writes it: what kind of work it is, and its times in whole nanoseconds."""

from __future__ import annotations

import re
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache

import msgspec

_NOTHING = msgspec.Raw()
_LARGEST_NS = 1 << 62
_PLAIN_NUMBER = re.compile(r'"?\s*[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d{1,3})?\s*"?', re.ASCII)


class EventKind(StrEnum):
    """What an event is; every event is of one kind, so the counts of all kinds add up to the events of a trace."""

    KERNEL = "GPU kernels"
    COPY = "GPU copies"
    SET = "GPU memsets"
    ANNOTATION = "annotations"
    GPU_ANNOTATION = "annotations on the GPU's timeline"
    OPERATOR = "CPU operators"
    RUNTIME = "CUDA calls"
    FLOW = "flow arrows"
    METADATA = "metadata"
    OTHER = "others"


GPU_WORK = frozenset({EventKind.KERNEL, EventKind.COPY, EventKind.SET})
"""What occupies a GPU. An annotation on the GPU's timeline spans kernels and is no work of its own."""

_BY_CATEGORY = {
    "kernel": EventKind.KERNEL,
    "gpu_memcpy": EventKind.COPY,
    "gpu_memset": EventKind.SET,
    "memcpy": EventKind.COPY,  # torch up to 1.12
    "memset": EventKind.SET,
    "user_annotation": EventKind.ANNOTATION,
    "gpu_user_annotation": EventKind.GPU_ANNOTATION,
    "cpu_op": EventKind.OPERATOR,
    "operator": EventKind.OPERATOR,
    "cuda_runtime": EventKind.RUNTIME,
    "cuda_driver": EventKind.RUNTIME,
    "runtime": EventKind.RUNTIME,
}
_BY_PHASE = {"s": EventKind.FLOW, "t": EventKind.FLOW, "f": EventKind.FLOW, "M": EventKind.METADATA}


class Event(msgspec.Struct, gc=False):
    """The fields that a comparison needs, undecoded where most events' are not looked at."""

    ph: str = ""
    """Phase: X for a whole event, B and E for its begin and end, others for arrows, marks and metadata."""
    cat: str | None = None
    name: str | None = None
    ts: msgspec.Raw = _NOTHING
    """Begin in microseconds: a number or, from Perfetto, a string."""
    dur: msgspec.Raw = _NOTHING
    pid: int | float | str | None = None
    tid: int | float | str | None = None
    args: msgspec.Raw = _NOTHING

    @property
    def device(self) -> int | float | str | None:
        """The GPU of an event of GPU work: its ``device`` argument, else its process, which profilers name so."""
        if not bytes(self.args):
            return self.pid
        found = _DEVICE.decode(self.args)
        return self.pid if found is None or found.device is None else found.device


@lru_cache(maxsize=4096)
def kind_of(phase: str, category: str | None) -> EventKind:
    """What an event is: by its category, where its phase does not say it."""
    if phase in _BY_PHASE:
        return _BY_PHASE[phase]
    return _BY_CATEGORY.get((category or "").lower(), EventKind.OTHER)


class _DeviceArgument(msgspec.Struct):
    device: int | float | str | None = None


_DEVICE = msgspec.json.Decoder(_DeviceArgument | None)


def nanoseconds(written: msgspec.Raw) -> int | None:
    """Whole nanoseconds of a time in microseconds, exact to the last digit; None where there is no time.

    Floating point would not do: microseconds since 1970 with three decimals have more digits than a float holds.
    Raises ``ValueError`` for what is no time.
    """
    data = bytes(written)
    whole, _, part = data.partition(b".")
    if whole.isdigit() and len(whole) < 16 and len(part) < 4 and (part.isdigit() or not part):
        return int(whole) * 1000 + int(part.ljust(3, b"0"))  # nearly all: the rest is slower
    if data in (b"", b"null"):
        return None
    text = data.decode(errors="replace")
    if not _PLAIN_NUMBER.fullmatch(text):
        raise ValueError(f"a time must be a number of microseconds: got {text[:40]}")
    number = Decimal(text.strip('"').strip()) * 1000
    if abs(number) >= _LARGEST_NS:
        raise ValueError(f"a time must be below 2^62 ns: got {text[:40]} us")
    return int(number.to_integral_value())
