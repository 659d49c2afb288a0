"""MLA_TUNE_RECORD: what processes met reaches one file, however they end, and a failing disk reaches nobody."""

from __future__ import annotations

import logging
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mla_tune.runtime import Dispatcher
from mla_tune.runtime.decider import Service
from mla_tune.runtime.recording import MAX_CELLS_PER_SITE, Recorder
from mla_tune.runtime.switches import Switches
from mla_tune.sites.served_shapes import ServedShape, Traffic, read_traffic
from tests.command import ENVIRONMENT, SOON_S
from tests.policy.strategies import full_policy

KEY = ServedShape("prefill_attention", "deepseek-v4-flash", 8192 + 128, 131072 + 2048, 4)
"""The middle of the bins that (8192, 131072, 4) lies in."""

SERVER = """
import os, signal, sys, time
from mla_tune.runtime.recording import Recorder

{before}
recorder = Recorder(sys.argv[1])
record = recorder.site("prefill_attention", "deepseek-v4-flash")
recorder.start()
{after}
for _ in range(5):
    record(8192, 131072, 4)
print("ready", flush=True)
{end}
"""


def server(path: Path, *, before: str = "", after: str = "", end: str = "time.sleep(60)") -> subprocess.Popen[str]:
    """A process that has recorded five forwards when it prints ``ready``."""
    script = SERVER.format(before=before, after=after, end=end)
    process = subprocess.Popen(
        [sys.executable, "-c", script, path],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate()[1]
    return process


def test_a_process_that_ends_leaves_its_shapes(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    process = server(path, end="")
    assert process.wait(SOON_S) == 0
    assert read_traffic(path) == Traffic({KEY: 5})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_process_that_a_signal_ends_leaves_its_shapes_and_ends_as_it_would_have(
    number: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    default = (
        f"signal.signal({int(number)}, signal.default_int_handler if {number == signal.SIGINT} else signal.SIG_DFL)"
    )
    process = server(
        path, before=default
    )  # what runs the tests may ignore a signal, as nohup does, and children inherit that
    process.send_signal(number)
    process.communicate(timeout=SOON_S)
    assert process.returncode == -number
    assert read_traffic(path) == Traffic({KEY: 5})


def test_a_handler_that_was_there_runs_after_the_flush(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    handler = (
        "signal.signal(signal.SIGTERM, lambda *_: (os.write(2, b'%d' % os.path.exists(sys.argv[1])), os._exit(7)))"
    )
    process = server(path, before=handler)
    process.terminate()
    assert process.communicate(timeout=SOON_S)[1] == "1"
    assert process.returncode == 7


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    process = server(path, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=SOON_S)


def test_a_process_that_is_killed_loses_no_more_than_the_last_interval(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    often = "import mla_tune.runtime.recording; mla_tune.runtime.recording.FLUSH_EVERY_S = 0.05"
    process = server(path, before=often)
    deadline = time.monotonic() + SOON_S
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=SOON_S)
    assert read_traffic(path) == Traffic({KEY: 5})


def test_ranks_and_restarts_that_name_one_file_add_up(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    together = [server(path) for _ in range(3)]
    for process in together:
        process.terminate()
    for process in together:
        process.communicate(timeout=SOON_S)
    server(path, end="").communicate(timeout=SOON_S)
    assert read_traffic(path) == Traffic({KEY: 20})


def test_a_forked_child_counts_what_it_met_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    fork = """
if os.fork() == 0:
    record(64, 64, 1)
    recorder.flush()
    os._exit(0)
os.wait()
"""
    server(path, end=fork).communicate(timeout=SOON_S)
    assert read_traffic(path) == Traffic({KEY: 5, KEY._replace(num_qo_tokens=65, kv_tokens=65, num_reqs=1): 1})


def test_a_flush_writes_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    recorder = Recorder(path)
    record = recorder.site("prefill_attention", "deepseek-v4-flash")
    record(8192, 131072, 4)
    recorder.flush()
    path.unlink()
    recorder.flush()
    assert not path.exists()
    record(8200, 131073, 4)  # the same bins
    recorder.flush()
    assert read_traffic(path) == Traffic({KEY: 1})


def test_the_histogram_is_bounded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl")
    record = recorder.site("prefill_attention", "deepseek-v4-flash")
    many = MAX_CELLS_PER_SITE + 50
    for index in range(many):
        record(index % 60, index // 60 % 60, index // 3600)
    recorder.flush()
    written = read_traffic(tmp_path / "t.jsonl")
    assert len(written.forwards) == MAX_CELLS_PER_SITE
    assert written.dropped == 50


def test_the_histogram_is_bounded_over_all_flushes_and_every_forward_beyond_is_counted(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl")
    record = recorder.site("prefill_attention", "deepseek-v4-flash")
    for index in range(MAX_CELLS_PER_SITE + 50):
        if index == MAX_CELLS_PER_SITE:
            recorder.flush()
        for _ in range(1 + (index >= MAX_CELLS_PER_SITE)):
            record(index % 60, index // 60 % 60, index // 3600)
    recorder.flush()
    written = read_traffic(tmp_path / "t.jsonl")
    assert len(written.forwards) == MAX_CELLS_PER_SITE
    assert written.dropped == 100


def test_flushing_and_counting_at_once_lose_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.jsonl")
    record = recorder.site("prefill_attention", "deepseek-v4-flash")
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            recorder.flush()

    flusher = threading.Thread(target=flush)
    flusher.start()
    for index in range(3000):
        record(index, index, 1)
    done.set()
    flusher.join()
    recorder.flush()
    assert sum(read_traffic(tmp_path / "t.jsonl").forwards.values()) == 3000


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
import logging
logging.basicConfig()
"""


def test_a_disk_that_is_full_ends_the_recording_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    end = "recorder.flush(); record(1, 1, 1); recorder.flush(); print('served', file=sys.stderr)"
    _, output = server(path, before=FULL_DISK, end=end).communicate(timeout=SOON_S)
    assert output.split("\n") == [
        f"WARNING:mla_tune:shapes are no longer recorded in {path}: File too large",
        "served",
        "",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.jsonl.lock"]


def test_a_real_file_system_without_room_ends_the_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here; the limit on file sizes above stands in for it")
    try:
        (small / "taken").write_bytes(bytes(resource.getpagesize()))
        recorder = Recorder(small / "t.jsonl")
        recorder.site("prefill_attention", "deepseek-v4-flash")(1, 1, 1)
        recorder.flush()
        assert "no longer recorded" in caplog.text
        assert "No space left on device" in caplog.text
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("content", ["somebody's notes\n", "schema: 1\n"])
def test_a_file_that_is_something_else_is_left_as_it_is(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notes"
    path.write_text(content)
    recorder = Recorder(path)
    recorder.site("prefill_attention", "deepseek-v4-flash")(1, 1, 1)
    for _ in range(2):
        recorder.flush()
    assert path.read_text() == content
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_without_the_variable_nothing_is_recorded_and_no_thread_runs(tmp_path: Path) -> None:
    before = threading.active_count()
    service = Service(Dispatcher(full_policy(), source="test"))
    decider = service.decider("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    decider(100, 100_000, 1)
    assert service.recorder is None
    assert threading.active_count() == before


def test_a_decider_records_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "start", lambda self: None)
    path = tmp_path / "t.jsonl"
    service = Service(Dispatcher(full_policy(), source="test", switches=Switches(record=str(path))))
    for layer, records in (("c4a", True), ("c128a", False)):
        decider = service.decider("prefill_attention", model="deepseek-v4-flash", layer=layer, records=records)
        decider(8192, 131072, 4)
    assert service.recorder is not None
    service.recorder.flush()
    assert read_traffic(path) == Traffic({KEY: 1})
