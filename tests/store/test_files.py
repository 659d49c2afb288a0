from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mla_tune.files import write_atomically


def test_a_new_file_gets_the_data_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.yaml", b"new")
    assert (tmp_path / "a.yaml").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.yaml"]


def test_an_old_file_is_replaced_and_its_open_readers_keep_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"old content")
    with path.open("rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old content"
    assert path.read_bytes() == b"new"


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_atomically(tmp_path / "a.yaml", b"new")
    assert (tmp_path / "a.yaml").stat().st_mode == plain.stat().st_mode


def test_a_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 255, "目" * 85, "é" * 127 + "x", "x" + "é" * 127, "\N{GRINNING FACE}" * 63])
def test_a_name_as_long_as_the_file_system_takes_is_written(name: str, tmp_path: Path) -> None:
    write_atomically(tmp_path / name, b"old")
    write_atomically(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["folder", "pipe"])
def test_what_is_not_a_regular_file_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = (tmp_path / name).stat().st_ino
    with pytest.raises(OSError, match="not a regular file"):
        write_atomically(tmp_path / name, b"new")
    assert (tmp_path / name).stat().st_ino == before
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_a_missing_folder_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a.yaml", b"new")
    assert os.listdir(tmp_path) == []


def test_a_write_that_runs_out_of_room_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"old")
    script = """
import resource, sys
from mla_tune.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomically(sys.argv[1], bytes(100_000))
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large\n"
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.yaml"]
