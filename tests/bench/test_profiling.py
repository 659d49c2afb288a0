"""Recording a trace of anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mla_tune.bench.profiling import record_trace
from mla_tune.trace.chrome_event import EventKind
from mla_tune.trace.difference import compare_traces
from mla_tune.trace.summary import Lane, summarize_trace


def test_each_round_and_each_run_in_it_is_an_annotation(tmp_path: Path) -> None:
    matrix = torch.ones(8, 8)
    path = tmp_path / "a.json.gz"
    record_trace(path, [("product", lambda: matrix @ matrix), ("sum", matrix.sum)], 3, "cpu")
    found = summarize_trace(path, Lane.CPU)
    assert found.events[EventKind.ANNOTATION] == 9
    assert {work.name: tally.count for work, tally in found.work.items()}["aten::mm"] == 3


def test_a_folder_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        record_trace(tmp_path / "no" / "a.json.gz", [("nothing", torch.get_num_threads)], 1, "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_trace_of_a_gpu_has_its_kernels(tmp_path: Path) -> None:
    matrix = torch.ones(256, 256, device="cuda")
    path = tmp_path / "a.json.gz"
    record_trace(path, [("product", lambda: matrix @ matrix)], 3, "cuda")
    found = compare_traces([path], [path])
    assert found.lane is Lane.GPU
    assert found.a.count(EventKind.KERNEL) >= 3
    assert 0 < found.wall.a <= found.a.sum_ns
