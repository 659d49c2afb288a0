"""What only a process of its own shows: Ctrl-C, a reader that goes away, a full disk, a missing package."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mla_tune.errors import StoreError
from mla_tune.store.database import Database
from mla_tune.store.measurement import Measurement
from tests.cli.conftest import SWEEP
from tests.command import COMMAND, ENVIRONMENT, SOON_S, group_members, run, start

LONG_SWEEP = ("sweep", "--gpu", "cpu", "--model", "deepseek-v4-flash")
GO_ON = "mla-tune: interrupted: what was measured is stored; run the same command again to go on"


def stored(folder: Path) -> list[Measurement]:
    path = folder / "db/cpu.db"
    if not path.is_file():
        return []
    with Database.open(path, create=False) as database:
        (environment,) = database.environments() or (None,)
        return database.measurements(environment.id) if environment else []


def has_points(folder: Path) -> bool:
    """Whether a sweep under way has stored a point; its database may be half made yet."""
    try:
        return bool(stored(folder))
    except StoreError:
        return False


def test_ctrl_c_in_a_sweep_says_how_to_go_on_keeps_its_points_and_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, *LONG_SWEEP)
    deadline = time.monotonic() + SOON_S
    while not has_points(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the worker as well
    out, err = process.communicate(timeout=SOON_S)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == GO_ON
    assert "Traceback" not in err
    while group_members(process.pid) and time.monotonic() < deadline + SOON_S:
        time.sleep(0.05)
    assert group_members(process.pid) == []
    kept = stored(tmp_path)
    assert kept
    again = run(tmp_path, *LONG_SWEEP, "--budget", "0.001", "--no-fit", "--json")
    assert again.returncode == 0
    assert f'"known": {len({(row.site, row.shape) for row in kept})}' in again.stdout
    assert {row.key for row in kept} <= {row.key for row in stored(tmp_path)}


@pytest.mark.parametrize("pause_s", [0.0, 0.01, 0.1, 0.3])
def test_ctrl_c_twice_ends_like_ctrl_c_once(pause_s: float, tmp_path: Path) -> None:
    process = start(tmp_path, *LONG_SWEEP)
    deadline = time.monotonic() + SOON_S
    while not has_points(tmp_path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(pause_s)
        if process.poll() is not None:
            break
    out, err = process.communicate(timeout=SOON_S)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == GO_ON
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    while group_members(process.pid) and time.monotonic() < deadline + SOON_S:
        time.sleep(0.05)
    assert group_members(process.pid) == []
    assert not list(tmp_path.rglob("*.lock"))
    kept = stored(tmp_path)
    assert kept
    assert run(tmp_path, *LONG_SWEEP, "--budget", "0.001", "--no-fit").returncode == 0
    assert {row.key for row in kept} <= {row.key for row in stored(tmp_path)}


@pytest.mark.parametrize("delay_s", [0.15, 0.4, 0.6, 1.2])
def test_ctrl_c_while_a_sweep_starts_is_one_line_too(delay_s: float, tmp_path: Path) -> None:
    workers_files = tmp_path / "temporary"
    workers_files.mkdir()
    process = start(tmp_path, *LONG_SWEEP, TMPDIR=str(workers_files))
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=SOON_S)
    assert out == ""
    assert list(workers_files.iterdir()) == []
    if "runpy" in err or "init_import_site" in err:  # before the first line of our code, Python reports the signal
        return
    # CPython ends by the signal, which shells report as 130 too, where it met an exec() such as dataclasses use.
    assert process.returncode in (130, -signal.SIGINT)
    assert err == f"{GO_ON}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("policy", "show", "--gpu", "cpu"),
        ("policy", "show", "--gpu", "cpu", "--json"),
        ("lookup", "4", "4000", *SWEEP[1:]),
        ("--help",),
    ],
    ids=" ".join,
)
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments: tuple[str, ...], folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, timeout=SOON_S
        )
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("lookup", "4", "4000", *SWEEP[1:]), ("policy", "show", "--gpu", "cpu")])
def test_output_to_a_full_disk_is_one_line_and_a_failure(arguments: tuple[str, ...], folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, timeout=SOON_S
        )
    assert result.returncode == 1
    assert result.stderr == b"mla-tune: [Errno 28] No space left on device\n"


def test_a_package_that_is_missing_is_named_with_what_brings_it(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for package, arguments in (("sqlite_utils", ("db", "ls")), ("numpy", ("fit", "--gpu", "cpu"))):
        stub = broken / f"{package}.py"
        stub.write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n")
        result = run(folder, *arguments, PYTHONPATH=f"{broken}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}")
        stub.unlink()
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        assert package in result.stderr
        assert "pip install 'mla-tune[tune]'" in result.stderr
