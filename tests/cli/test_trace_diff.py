"""``trace-diff`` as a user sees it: figures that add up, 80 columns, a page of its own, and one line for what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mla_tune.cli import run as run_here
from mla_tune.trace.summary import summarize_trace
from tests.checkout import ROOT
from tests.trace.traces import document, kernel, write

LONG = "void flash::" + "sparse_kernel<float, 64>::" * 20 + "operator()"
BEFORE = [
    kernel("gone", 0, 30),
    kernel("steady", 40, 100),
    kernel(LONG, 200, 50),
    kernel("more often", 300, 10),
    kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 190, 20, stream=8),
]
AFTER = [
    kernel("new <script>", 0, 45),
    kernel("steady", 50, 101),
    kernel(LONG, 200, 70),
    kernel("more often", 300, 10),
    kernel("more often", 320, 10),
    kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 190, 20, stream=8),
]
PROFILER = ROOT.parent / "shared" / "traces" / "profiler"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.delenv("COLUMNS", raising=False)  # a pipe has no width, whatever the run's own terminal has
    return write(tmp_path / "a.json.gz", document(BEFORE, 0)), write(tmp_path / "b.json.gz", document(AFTER, 0))


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    code = run_here(["trace-diff", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_each_list_has_its_names_with_counts_and_summed_times(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, *pair)
    for expected in (
        "added: GPU work of B alone: 1\n  1 x, 45.000 us\n    new <script>\n",
        "removed: GPU work of A alone: 1\n  1 x, 30.000 us\n    gone\n",
        "  1 -> 2 x, 10.000 -> 20.000 us (+10.000, +100.0 %)\n    more often\n",
        f"  1 x, 50.000 -> 70.000 us (+20.000, +40.0 %)\n    {LONG}\n",
    ):
        assert expected in text
    assert text.endswith("CUDA wall: B takes 46.000 us more than A (+23.0 %)\n")
    assert "steady" not in text


def test_the_terminal_has_80_columns_and_no_name_is_cut(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = output(capsys, *pair)
    assert max(map(len, text.splitlines())) <= 80
    assert re.sub(r"\s", "", LONG) in re.sub(r"\s", "", text)


def test_figures_of_hours_keep_their_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = write(tmp_path / "a.json", [kernel("x", 0, 36e8), kernel("y", 5e9, 1)])
    other = write(tmp_path / "b.json", [kernel("x", 0, "0.001"), kernel("y", 5e9, 1)])
    assert max(map(len, output(capsys, other, path).splitlines())) <= 80


def test_only_the_largest_changes_are_listed_unless_all_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.json", [kernel("same", 0, 1)])
    b = write(tmp_path / "b.json", [kernel("same", 0, 1), *(kernel(f"new {n}", n, n) for n in range(1, 31))])
    short, whole = output(capsys, a, b), output(capsys, a, b, "--top", "0")
    assert "  and 10 more, +55.000 us in sum (--top 0 shows all)\n" in short
    assert [short.count("new "), whole.count("new ")] == [20, 30]


def test_json_has_every_figure_in_whole_nanoseconds(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(output(capsys, *pair, "--json"))
    account = found["account"]
    assert sum(line["delta_ns"] for line in account["wall"]) == found["b"]["wall_ns"] - found["a"]["wall_ns"] == 46_000
    assert sum(line["a"] for line in account["events"]) == found["a"]["events"] == 5
    assert account["nccl_alone"]["a_ns"] == found["a"]["wall_ns"] - found["a"]["wall_without_nccl_ns"] == 10_000
    assert (found["a"]["gpu_kernels"], found["a"]["sum_ns"], found["a"]["traces"][0]["rank"]) == (5, 210_000, 0)
    names = {group: [row["name"] for row in found[group]] for group in ("added", "removed", "recounted", "retimed")}
    assert names == {"added": ["new <script>"], "removed": ["gone"], "recounted": ["more often"], "retimed": [LONG]}


class Page(HTMLParser):
    """Text and tags of a page; fails where a tag is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_has_every_name_and_needs_nothing_else(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "diff.html"
    output(capsys, *pair, "--html", target)
    text = target.read_text()
    page = Page(text)
    assert not page.open
    assert not page.links
    assert "script" not in set(re.findall(r"<(\w+)", text))
    for word in ("gone", "new <script>", LONG, "steady", "CUDA wall: B takes 46.000 us more than A (+23.0 %)"):
        assert word in page.words


def test_a_name_with_control_characters_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.json", [kernel("same", 0, 1)])
    b = write(tmp_path / "b.json", [kernel("same", 0, 1), kernel("red\x1b[31m\nline", 0, 1)])
    assert "    red\\x1b[31m\\nline\n" in output(capsys, a, b)


REFUSALS = {
    "no side B": (["a.json"], 2, "Missing argument"),
    "a negative number of names": (["a.json", "a.json", "--top", "-1"], 2, "got -1"),
    "names in words": (["a.json", "a.json", "--top", "all"], 2, "'--top'"),
    "a file that is not there": (["a.json", "no.json"], 1, "no such file 'no.json'"),
    "nothing": (["a.json", ""], 1, "no such file ''"),
    "a pattern without a match": (["a.json", "*.gz"], 1, "no file here is named like *.gz"),
    "an empty folder": (["a.json", "empty"], 1, "no file there ends in .json or .json.gz"),
    "a trace that is cut short": (["a.json", "cut.json"], 1, "the JSON is cut short"),
    "a page in a folder that is not there": (["a.json", "a.json", "--json", "--html", "no/x.html"], 1, "no/"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_compared_is_one_line_and_an_exit_code(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = write(tmp_path / "a.json", document(BEFORE))
    (tmp_path / "cut.json").write_bytes(whole.read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_here(["trace-diff", *arguments]) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


HTA = {
    "control.json.gz": (174, 9450, 501_567_000, "36579594eaf11c7787a6de4e2add069cbd6f91ee876d9fa6b0518dd01d362031"),
    "test.json.gz": (135, 15_632, 963_762_000, "552f5125ef511516a179fefd6590a2dc7da600bb6374414d739496e442596192"),
}
"""What HolisticTraceAnalysis 0.5.0 finds: names, runs, summed nanoseconds, and the digest of all of it by name."""


@pytest.mark.skipif(not PROFILER.is_dir(), reason="the pair of HolisticTraceAnalysis does not lie beside this checkout")
@pytest.mark.parametrize("name", HTA)
def test_counts_and_durations_by_name_are_those_of_holistic_trace_analysis(name: str) -> None:
    found = summarize_trace(PROFILER / name).work
    rows = sorted((work.name, tally.count, tally.sum_ns) for work, tally in found.items())
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert (len(rows), sum(row[1] for row in rows), sum(row[2] for row in rows), digest) == HTA[name]
