"""Traces for tests: events as torch.profiler writes them, in files of every form that a reader meets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Row = dict[str, Any]
"""An event as JSON has it."""

NAMES = ("gemm", "softmax", "Memcpy DtoD (Device -> Device)", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "top, {k}")
CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset", "cpu_op", "user_annotation", "gpu_user_annotation", "cuda_runtime")


def kernel(name: str, ts: object, dur: object, device: int = 0, stream: int = 7, **more: object) -> Row:
    """One kernel; times in microseconds."""
    args = {"device": device, "stream": stream, "grid": [1, 1, 1], "warps": [{"a": 1}, {"b": 2}]}
    row = {"ph": "X", "cat": "kernel", "name": name, "pid": device, "tid": stream, "ts": ts, "dur": dur, "args": args}
    return row | more


def document(events: Sequence[Row], rank: int | None = None) -> dict[str, Any]:
    """A whole trace."""
    info = {} if rank is None else {"distributedInfo": {"backend": "nccl", "rank": rank, "world_size": 8}}
    devices = [{"id": 0, "name": "NVIDIA H200"}, {"id": 1, "name": "NVIDIA H200"}]
    return {"schemaVersion": 1, "deviceProperties": devices, **info, "traceEvents": list(events), "traceName": "t.json"}


def write(path: Path, content: object) -> Path:
    """Write ``content`` as JSON, compressed where the name says so."""
    text = json.dumps(content).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path


@st.composite
def events(draw: st.DrawFn) -> Row:
    """Any event of a profiler, at nanosecond resolution and long after 1970."""
    name, category = draw(st.sampled_from(NAMES)), draw(st.sampled_from(CATEGORIES))
    device, stream = draw(st.integers(0, 1)), draw(st.integers(7, 8))
    begin_ns = 1_661_203_462_598_738_000 + draw(st.integers(0, 100_000))
    dur_ns = draw(st.integers(0, 40_000))
    return kernel(name, us(begin_ns), us(dur_ns), device, stream, cat=category)


def us(nanoseconds: int) -> str:
    """Microseconds as text, exact; Perfetto writes times so."""
    return f"{nanoseconds // 1000}.{nanoseconds % 1000:03d}"


def some_events(least: int = 1) -> st.SearchStrategy[list[Row]]:
    """The events of one trace; one at least is work of a GPU."""
    return st.lists(events(), min_size=least, max_size=30).map(lambda rows: [*rows, kernel("gemm", 5, 1)])
