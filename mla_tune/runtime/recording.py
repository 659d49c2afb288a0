"""Recording the shapes of a server: ``MLA_TUNE_RECORD=FILE``.

A decision adds one to a dictionary of integers, nothing else. A thread adds what is new to the file once a minute, so
that a process that is killed loses at most that; exit and the usual signals do so too, each process its own share
under a lock, so that several ranks may name one file, and a restarted server goes on with it. Whatever goes wrong there
(a full disk, a file that is something else) ends the recording with one line in the log, and never reaches the engine.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mla_tune.sites.served_shapes import ServedShape, Traffic, bin_middle, bin_start, read_traffic, write_traffic

Record = Callable[[int, int, int], None]
"""``record(num_qo_tokens, kv_tokens, num_reqs)``."""

MAX_CELLS_PER_SITE = 1 << 14
"""Bound on memory, about 4 MB a site. Full chunks with up to 64 requests and 1M tokens of context fill a few thousand."""
FLUSH_EVERY_S = 60.0
LOCK_PATIENCE_S = 5.0
"""A process that is asked to end does not wait longer for another one that writes."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_log = logging.getLogger("mla_tune")


class _Histogram:
    """The cells of one site and model in this process.

    A decision only counts its own three integers; a flush moves what came since the last one into bins. Under the global
    lock no other thread runs between the steps of a decision's ``+= 1``, nor within a ``pop``.
    """

    __slots__ = ("bins", "dropped", "model", "new", "site", "wake")

    def __init__(self, site: str, model: str, wake: threading.Event) -> None:
        self.site, self.model, self.wake = site, model, wake
        self.clear()

    def clear(self) -> None:
        self.new: dict[tuple[int, int, int], int] = {}
        self.bins: dict[ServedShape, int] = {}
        self.dropped = 0

    def add(self, num_qo_tokens: int, kv_tokens: int, num_reqs: int) -> None:
        """Count one forward."""
        key = (num_qo_tokens, kv_tokens, num_reqs)
        new = self.new
        if key in new:
            new[key] += 1
        elif len(new) < MAX_CELLS_PER_SITE:
            new[key] = 1
            if len(new) == MAX_CELLS_PER_SITE // 2:
                self.wake.set()
        else:
            self.dropped += 1

    def snapshot(self) -> Traffic:
        """Everything since the start, in bins."""
        for key in list(self.new):
            forwards = self.new.pop(key)
            shape = ServedShape(self.site, self.model, *(bin_middle(bin_start(count)) for count in key))
            if shape in self.bins or len(self.bins) < MAX_CELLS_PER_SITE:
                self.bins[shape] = self.bins.get(shape, 0) + forwards
            else:
                self.dropped += forwards
        return Traffic(dict(self.bins), self.dropped)


class Recorder:
    """The histograms of this process and their file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.stopped: str | None = None
        """Why nothing is recorded any more; None while it is."""
        self._histograms: list[_Histogram] = []
        self._written = Traffic({})
        self._lock = threading.RLock()
        self._flushing = False
        self._wake = threading.Event()
        self._chained: dict[int, Any] = {}

    def site(self, site: str, model: str) -> Record:
        """The function that counts one forward of ``site``; negative counts are the caller's mistake."""
        histogram = _Histogram(site, model, self._wake)
        self._histograms.append(histogram)
        return histogram.add

    def start(self) -> None:
        """Flush from now on: by a thread, at exit, and, if this is the main thread, on signals."""
        atexit.register(self.flush)
        os.register_at_fork(after_in_child=self._after_fork)
        self._start_thread()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                previous = signal.getsignal(number)
                # None: a handler that was not set from Python, which cannot be called from here. An ignored signal
                # stays ignored.
                if previous is not None and previous is not signal.SIG_IGN:
                    self._chained[number] = previous
                    signal.signal(number, self._on_signal)

    def flush(self) -> None:
        """Add what is new since the last flush to the file. Never raises: a failure ends the recording."""
        if self.stopped is not None or not self._lock.acquire(timeout=LOCK_PATIENCE_S):
            return
        try:
            if not self._flushing:  # a signal may interrupt a flush of this very thread
                self._flushing = True
                self._flush()
                self._flushing = False
        # Any error at all: this runs in signal handlers and at exit of a server that must not notice it.
        except Exception as error:
            self._stop(error)
        finally:
            self._lock.release()

    def _flush(self) -> None:
        now = Traffic({})
        for histogram in self._histograms:
            now = now.plus(histogram.snapshot())
        new = {
            shape: count - self._written.forwards.get(shape, 0)
            for shape, count in now.forwards.items()
            if count > self._written.forwards.get(shape, 0)
        }
        if not new and now.dropped == self._written.dropped:
            return
        with _locked(f"{self.path}.lock") as held:
            if not held:
                return  # what is new stays new, for the next flush
            there = read_traffic(self.path) if os.path.exists(self.path) else Traffic({})
            write_traffic(self.path, there.plus(Traffic(new, now.dropped - self._written.dropped)))
        self._written = now

    def _stop(self, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self.stopped = f"shapes are no longer recorded in {self.path}: {reason}"
        _log.warning("%s", self.stopped)
        for histogram in self._histograms:
            histogram.clear()
        self._wake.set()

    def _start_thread(self) -> None:
        threading.Thread(target=self._flush_often, name="mla-tune-recorder", daemon=True).start()

    def _flush_often(self) -> None:
        while self.stopped is None:
            self._wake.wait(FLUSH_EVERY_S)
            self._wake.clear()
            self.flush()

    def _after_fork(self) -> None:
        """A forked child counts from zero: what was counted before belongs to its parent."""
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._flushing = False
        self._written = Traffic({})
        for histogram in self._histograms:
            histogram.clear()
            histogram.wake = self._wake
        if self.stopped is None:
            self._start_thread()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.flush()
        previous = self._chained[number]
        if callable(previous):
            previous(number, frame)
        else:  # the default action, which only the system can take
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Hold the lock file beside the recording, which itself is replaced at every flush; False if others hold it long."""
    import fcntl

    with open(path, "ab") as file:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield False
                    return
                time.sleep(0.01)
            else:
                yield True
                return
