"""A worker process as the parent holds it: started, asked, listened to, replaced, and never left behind.

Workers are forked from a server process that has imported torch and has touched no device, so that a fresh one costs a
fork and a CUDA context instead of seconds of imports. The server ends with this process, and the workers with the server.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from mla_tune.errors import EnvironmentMismatchError, MlaTuneError
from mla_tune.hardware.nvml import detect_gpu
from mla_tune.notice import say_once
from mla_tune.sites.site import Site
from mla_tune.sweep.worker.messages import (
    Hello,
    Message,
    Notice,
    Offer,
    Refused,
    Support,
    SupportQuery,
    Task,
    Trial,
    Wanted,
)
from mla_tune.sweep.worker.same_gpu import require_same_gpu

START_TIMEOUT_S = 180.0
"""Longest wait for a new worker: importing torch and creating a CUDA context on a cold machine takes tens of seconds."""
STOP_TIMEOUT_S = 5.0
_LONGEST_FOLDER_BYTES = 103 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""A socket's path has at most 103 bytes on every system (107 on Linux), and multiprocessing adds this much to a folder."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run/shm")
_KEPT_CHARACTERS = 200
"""Characters of a dead worker's output that a measurement keeps."""


class WorkerProcess:
    """One worker. Whatever it or a kernel library prints goes to a file of its own, never to this process's output."""

    def __init__(self, kind: str, added: str = "", jit_cache: str = "") -> None:
        """Start it and wait until it is ready; ``added`` names a module with further candidates.

        What a kernel library compiles goes to a folder of its own, or to ``jit_cache``, which stays. Raises
        :class:`EnvironmentMismatchError` if the device cannot be used, or is another GPU than this process sees.
        """
        self._kind = kind
        handle, name = tempfile.mkstemp(prefix="mla-tune-worker-", suffix=".log")
        self._log = os.fdopen(handle, errors="replace")
        self._own_cache = "" if jit_cache else f"{name}.jit"
        cache = jit_cache or self._own_cache
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mla_tune.sweep.worker.preload"])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_enter, args=(theirs, kind, name, cache, added), daemon=True)
        try:
            with _ctrl_c_held_back(), _short_temporary_folder():
                self._process.start()
            theirs.close()
            self.hello = self._greeting()
            if kind == "cuda":
                require_same_gpu(detect_gpu(), self.hello)
        except BaseException:  # Ctrl-C too must leave neither the process nor its file behind
            self.stop()
            Path(name).unlink(missing_ok=True)
            raise

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    def send(self, task: Task | Trial | Wanted | SupportQuery) -> None:
        """Hand it a task. Raises ``OSError`` if it is dead."""
        self._connection.send(task)

    def receive(self, timeout_s: float) -> Message | None:
        """Its next message; None if none comes within ``timeout_s``. Raises ``EOFError`` or ``OSError`` if it is dead."""
        deadline = time.monotonic() + timeout_s
        while self._connection.poll(max(0.0, deadline - time.monotonic())):
            message: Message | Notice = self._connection.recv()
            if not isinstance(message, Notice):
                return message
            say_once(message.line)
        return None

    def offer(self, name: str, timeout_s: float) -> Offer:
        """The kernels of engine ``name`` as they can run here. Raises :class:`EnvironmentMismatchError` if they cannot."""
        try:
            self.send(Wanted(name))
            message = self.receive(timeout_s)
        except (EOFError, OSError):
            message = Refused(f"importing the kernels of {name} failed: {self.exit_summary()}")
        if isinstance(message, Offer):
            return message
        reason = message.reason if isinstance(message, Refused) else f"no answer within {timeout_s:.0f} s"
        raise EnvironmentMismatchError(reason)

    def support(self, pairs: tuple[tuple[Site, str], ...], timeout_s: float) -> tuple[str | None, ...] | None:
        """Why each (site, candidate) cannot run here, None where it can; None where the worker ended over the question."""
        try:
            self.send(SupportQuery(pairs))
            message = self.receive(timeout_s)
        except (EOFError, OSError):
            message = None
        return message.reasons if isinstance(message, Support) else None

    def exit_summary(self) -> str:
        """How it ended and the last line that it printed, for a process that is dead or dying."""
        self._process.join(STOP_TIMEOUT_S)
        ending = f"worker ended with exit code {self._process.exitcode}"
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return f"{ending}: {lines[-1][:_KEPT_CHARACTERS]}" if lines else ending

    def stop(self) -> None:
        """End it: by closing its pipe, and by force where that is not enough."""
        self._connection.close()
        if self._process.pid is not None:
            self._process.join(0.2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOP_TIMEOUT_S)
        self._log.close()
        if self._own_cache:
            shutil.rmtree(self._own_cache, ignore_errors=True)

    def _greeting(self) -> Hello:
        try:
            message = self.receive(START_TIMEOUT_S)
        except (EOFError, OSError):
            message = None
        if isinstance(message, Hello):
            return message
        if isinstance(message, Refused):
            raise EnvironmentMismatchError(message.reason)
        raise MlaTuneError(
            f"the {self._kind} worker did not start: {self.exit_summary()}; run `mla-tune env` to see why"
        )


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Start a process in here: Ctrl-C comes after it, and never to that process, where it would print a traceback."""
    resource_tracker.ensure_running()  # first: starting it unblocks the signal again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # what the new process inherits
    pressed: list[int] = []
    # The mask is this thread's alone: another may take the signal, and the exception would still be raised here.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number)) if main else None
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
    for number in pressed[:1]:
        signal.raise_signal(number)


@contextmanager
def _short_temporary_folder() -> Iterator[None]:
    """Start the server of workers in here: it listens on a socket in the temporary folder, whose path may be too long.

    Schedulers and CI give a job a folder of its own below a long path. Everything but the socket stays there.
    """
    usual, named = tempfile.gettempdir(), tempfile.tempdir
    if len(os.fsencode(usual)) <= _LONGEST_FOLDER_BYTES:
        yield
        return
    folders = (*_SHORT_FOLDERS, os.environ.get("XDG_RUNTIME_DIR", ""))
    short = next((folder for folder in folders if folder and _can_hold_a_socket(folder)), None)
    if short is None:
        raise MlaTuneError(
            f"a worker's socket must have a path of at most 103 bytes: the temporary folder {usual} is too long, and none "
            f"of {', '.join(filter(None, folders))} is writable; set TMPDIR to a shorter path"
        )
    tempfile.tempdir = short
    try:
        yield
    finally:
        tempfile.tempdir = named


def _can_hold_a_socket(folder: str) -> bool:
    return (
        len(os.fsencode(folder)) <= _LONGEST_FOLDER_BYTES
        and os.path.isdir(folder)
        and os.access(folder, os.W_OK | os.X_OK)
    )


def _enter(connection: Connection, kind: str, log: str, jit_cache: str, added: str) -> None:
    try:
        sink = os.open(log, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:  # the parent has given up already
        os._exit(1)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.unlink(log)  # both ends have it open; however they end, nothing is left behind
    if kind == "cuda":
        # First calls are measured as a server that never ran here sees them: DeepGEMM's cache on disk would hide them.
        os.environ["DG_JIT_CACHE_DIR"] = jit_cache
        os.makedirs(jit_cache, exist_ok=True)
    from mla_tune.sweep.worker.server import serve  # imported here so that the parent never loads torch

    serve(connection, kind, added)
