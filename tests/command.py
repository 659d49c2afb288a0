"""The command line in processes of its own, and what is left of a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SOON_S = 240.0
"""Patience of a test on a busy machine: what it waits for takes milliseconds to seconds, only a failure takes all of it."""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
}
COMMAND = [sys.executable, "-m", "mla_tune"]


def run(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One command, run to its end in ``folder``, which is the user's folder too."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**ENVIRONMENT, "MLA_TUNE_HOME": ".", **variables},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=SOON_S,
    )


def interruptible() -> None:
    """Let Ctrl-C reach a new process (``preexec_fn``) even where the test run itself ignores it, as under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: Path, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """One command, under way in ``folder`` as the leader of a process group of its own."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**ENVIRONMENT, "MLA_TUNE_HOME": ".", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def group_members(group: int) -> list[str]:
    """Names of the processes of a group, zombies left out."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, process_group, *_ = rest.split()
            if int(process_group) == group and state not in "ZX":
                members.append(name)
    return members


def wait_until_gone(pid: int) -> None:
    """Fail unless the process ends soon."""
    deadline = time.monotonic() + SOON_S
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)
