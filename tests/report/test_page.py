"""The file itself: alone, small, always the same, and refused in one line where it cannot be made."""

from __future__ import annotations

import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from mla_tune.cli import run
from mla_tune.report.contents import Contents
from mla_tune.report.page import page
from mla_tune.report.picture import picture
from tests.cli.test_base_install import WITHOUT
from tests.report.conftest import ROOT

MOST_BYTES = 6_000_000


@pytest.fixture(scope="module")
def html(h100: Contents) -> str:
    return page(h100).decode()


def test_a_report_is_one_file_of_less_than_six_megabytes_that_is_always_the_same(h100: Contents, html: str) -> None:
    assert page(h100).decode() == html
    assert len(html) < MOST_BYTES


def test_the_page_loads_nothing_and_names_no_place_of_this_machine(html: str) -> None:
    without_code = re.sub(r"<script type=.*?</script>", "", html, flags=re.DOTALL)  # data, and plotly packed
    assert re.findall(r'(?:src|href)="(?!data:,)[^"]*"', without_code) == []
    assert "http:" not in without_code
    assert "https:" not in without_code
    assert str(ROOT) not in html


def test_data_cannot_end_the_element_that_holds_it(h100: Contents) -> None:
    (origin, *others) = h100.policies
    hostile = msgspec.structs.replace(origin, file="</script><script>alert(1)</script>")
    text = page(msgspec.structs.replace(h100, policies=(hostile, *others))).decode()
    assert "<script>alert" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert msgspec.json.decode(data[1])["policies"][0]["file"] == hostile.file


def test_every_model_has_its_verdict_on_top_and_every_limit_its_reason(h100: Contents, html: str) -> None:
    for entry in h100.maps:
        if entry.layer == "forward" and entry.engine == "sglang":
            assert entry.win.sentence.replace("'", "&#x27;") in html
    assert "does not serve: its first calls are too long" in html


def test_a_modelled_report_says_so_and_how_far_it_may_be_off(h800: Contents) -> None:
    text = page(h800).decode()
    assert "is modelled: scaled from nvidia-h200" in text
    assert re.search(r"may be off by a factor of 1\.\d+ to \d\.\d+ both ways", text)


def test_a_picture_is_1600_pixels_wide_and_small(h100: Contents, h800: Contents) -> None:
    for found in (h100, h800):
        entry = found.maps[-1]
        data = picture(found, entry, entry.views[0])
        assert Image.open(BytesIO(data)).size[0] == 1600
        assert len(data) <= 150_000
    assert data == picture(found, entry, entry.views[0])


def test_no_sign_of_a_pictures_heading_is_cut_off(h100: Contents) -> None:
    import numpy as np

    entry = h100.maps[0]
    long = msgspec.structs.replace(entry, engine_words="An engine with quite a long name " * 4)
    heading = np.asarray(Image.open(BytesIO(picture(h100, long, long.views[0]))).convert("L"))[:190]
    assert (heading[:, -20:] > 250).all()
    assert (heading < 128).any()


def test_the_example_is_a_small_picture() -> None:
    path = ROOT / "mla_tune" / "report" / "example.png"
    assert path.stat().st_size <= 150_000
    assert Image.open(path).size[0] == 1600


def readme_commands() -> list[list[str]]:
    """Every command of the README beside the report."""
    lines = (ROOT / "mla_tune" / "report" / "README.md").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.startswith("    mla-tune ")]


def test_the_readmes_commands_write_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mla_tune" / "report").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert len(commands) == 2
    for command in commands:
        # One policy of a GPU with few measurements takes a fifth of the time that all of an H200's take.
        words = {"--gpu": "--policy", "h200": str(ROOT / "policies" / "nvidia-h100.sglang.yaml")}
        assert run([words.get(word, word) for word in command]) == 0
        assert (tmp_path / command[-1]).stat().st_size > 10_000
    assert (tmp_path / "report.html").stat().st_size < MOST_BYTES


REFUSED = {
    "a page and a picture": (["--gpu", "h100", "-o", "a.html", "--png", "a.png"], "got --out a.html as well", 2),
    "measurements of nothing": (["--gpu", "h100", "--measurements", "a.jsonl"], "without --policy", 2),
    "unknown layer": (["--gpu", "h100", "--png", "a.png", "--layer", "c9a"], "got none for prefill_attention", 1),
    "unknown model": (["--gpu", "h100", "--png", "a.png", "--model", "v9"], "got 'v9'; accepted: deepseek-v4-flash", 2),
    "unknown engine": (["--gpu", "h100", "--png", "a.png", "--engine", "trt"], "got 'trt'; accepted: sglang, vllm", 2),
    "unknown provider": (["--gpu", "h100", "--png", "a.png", "--provider", "x"], "got 'x'; accepted: own, sglang", 2),
    "unknown site": (["--gpu", "h100", "--png", "a.png", "--site", "moe"], "got 'moe'; accepted: prefill_attention", 2),
    "no such gpu": (["--gpu", "h300"], "got 'h300'; accepted: auto", 2),
    "no measurements here": (
        ["--policy", "other/p.yaml"],
        "db/nvidia-h100.jsonl, which p.yaml was made of, is not here",
        1,
    ),
}


@pytest.mark.parametrize(("arguments", "text", "code"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_reported_is_refused_in_one_line(
    arguments: list[str],
    text: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "p.yaml").write_bytes((ROOT / "policies" / "nvidia-h100.yaml").read_bytes())
    assert run(["report", *arguments]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert text in told.err
    assert not list(tmp_path.glob("*.html")) + list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(("package", "options"), [("plotly", []), ("matplotlib", ["--png", "a.png"])])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    package: str, options: list[str], tmp_path: Path
) -> None:
    script = WITHOUT.format(names=[package])
    arguments = ["report", "--policy", str(ROOT / "policies" / "nvidia-h100.sglang.yaml"), *options]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{package} is not installed; next: pip install 'mla-tune[report]'" in done.stderr
