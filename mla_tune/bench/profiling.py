"""Recording a trace of torch.profiler; what runs is the caller's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mla_tune.files import write_atomically

LabelledRun = tuple[str, Callable[[], object]]
"""A name for the trace and what it names."""


def record_trace(path: Path, runs: Sequence[LabelledRun], repeats: int, kind: str) -> None:
    """Run ``runs`` in order ``repeats`` times under the profiler and write the trace, compressed, to ``path``.

    Each round is an annotation ``round`` and each run in it one of its label. ``kind`` is ``cpu`` or ``cuda``. Nothing is
    warmed up here. Raises ``OSError`` where the file cannot be written; then there is none, or the old one.
    """
    on_gpu = kind == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            with record_function("round"):
                for label, run in runs:
                    with record_function(label):
                        run()
            if on_gpu:
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(written))
        write_atomically(path, written.read_bytes())
