"""The commands on traffic, by the committed H200 policy and a made-up trace; one spot check on this machine's CPU."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mla_tune.cli import run
from mla_tune.cli.output.traffic_output import percent
from mla_tune.replay.spot import read_forwards
from mla_tune.sites.served_shapes import read_traffic

ROOT = Path(__file__).parents[2]
TRACE = ROOT / "tests" / "replay" / "conversation.jsonl"
FLASH = ("--model", "deepseek-v4-flash", "--gpu", "h200")
REPLAY = ("traffic", *FLASH, "--trace", str(TRACE))


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the committed policies and measurements, which is the current one."""
    for name in ("db", "policies"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.db*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLA_TUNE_HOME", ".")
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = run(arguments)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(output(capsys, *arguments, "--json"))


def test_a_trace_is_replayed_and_every_rule_told_beside_the_incumbent(capsys: pytest.CaptureFixture[str]) -> None:
    told = as_json(capsys, *REPLAY, "--chunk", "2048")
    rules = {rule["rule"]: rule for rule in told["rules"]}
    assert {
        "policy",
        "policy, each layer type by its own table",
        "always sparse_fwd",
        "always with_kvcache",
        "num_qo_tokens > 11673",
        "kv_tokens < 512 * num_qo_tokens",
        "fastest candidate of each forward",
    } == set(rules)
    assert (told["requests"], told["left_out"]) == (24, 0)
    assert told["engine"]["chunk_tokens"] == 2048
    assert rules["always sparse_fwd"]["is_incumbent"]
    assert rules["always sparse_fwd"]["against_incumbent"] == 0.0
    oracle_us = rules["fastest candidate of each forward"]["total_us"]
    assert all(rule["total_us"] * (1 + 1e-9) >= oracle_us for name, rule in rules.items() if "layer" not in name)
    printed = output(capsys, *REPLAY, "--chunk", "2048")
    for name, rule in rules.items():
        assert name in printed
        assert f"{rule['p99_us'] / 1e3:.2f}" in printed
    assert printed == output(capsys, *REPLAY, "--chunk", "2048")


def test_no_gain_is_printed_as_zero(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, *REPLAY, "--speed", "inf")
    (policy,) = (line for line in printed.splitlines() if line.startswith("│ policy  "))
    assert policy.count("│ 0.00% ") == 1
    assert "│ 0.0% " in policy
    assert [percent(x) for x in (0.0, -0.00001, 0.00001, -0.1, 0.5)] == [
        "0.00%",
        "0.00%",
        "0.00%",
        "-10.00%",
        "+50.00%",
    ]


def test_an_agentic_mix_is_stated_and_repeats_with_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    mix = ("traffic", "--model", "deepseek-v3.2", "--gpu", "h200", "--agents", "3", "--turns", "4", "--h-q", "64")
    first, again, other = (as_json(capsys, *mix, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other
    assert first["requests"] == 12
    assert "3 agents of 4 turns, first prompt 20000, 500 new tokens and 1500 of growth a turn" in first["traffic"]
    assert first["h_q"] == 64
    assert next(rule for rule in first["rules"] if rule["is_incumbent"])["rule"] == "always with_kvcache"


def test_requests_longer_than_the_models_context_are_left_out_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    long = {"timestamp": 0, "input_length": 200_000, "output_length": 1, "hash_ids": list(range(391))}
    Path("long.jsonl").write_text(TRACE.read_text() + json.dumps(long) + "\n")
    arguments = ("traffic", "--model", "deepseek-v3.2", "--gpu", "h200", "--trace", "long.jsonl")
    assert as_json(capsys, *arguments)["left_out"] == 1
    assert "1 requests were left out" in output(capsys, *arguments)


def test_forwards_are_recorded_as_a_server_records_them(capsys: pytest.CaptureFixture[str]) -> None:
    told = as_json(capsys, *REPLAY, "--record", "met.jsonl")
    recorded = read_traffic("met.jsonl")
    assert recorded.dropped == 0
    for site in ("prefill_attention", "indexer_metadata"):
        cells = {shape: count for shape, count in recorded.forwards.items() if shape.site == site}
        assert sum(cells.values()) == told["forwards"]
        assert {shape.model for shape in cells} == {"deepseek-v4-flash"}
        tokens = sum(shape.num_qo_tokens * count for shape, count in cells.items())
        assert tokens == pytest.approx(told["prompt_tokens"] - told["cached_tokens"], rel=1 / 32)


def test_drawn_forwards_are_written_with_where_they_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, *REPLAY, "--spot-check", "5", "--forwards", "drawn.json", "--seed", "3")
    drawn = read_forwards("drawn.json")
    assert (len(drawn.forwards), drawn.model, drawn.h_q, drawn.seed) == (5, "deepseek-v4-flash", 64, 3)
    assert drawn.source.startswith("conversation.jsonl, arrivals at speed 1; chunks of 8192, concurrency 64")
    output(capsys, *REPLAY, "--spot-check", "5", "--forwards", "again.json", "--seed", "3")
    assert Path("again.json").read_bytes() == Path("drawn.json").read_bytes()


def test_drawn_forwards_are_measured_with_the_candidates_of_this_machine(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    requests = [[[1, 90], [3, 3], [2, 1100]], [[2, 40]]]
    drawn = {
        "format": "mla-tune-forwards",
        "version": 1,
        "model": "deepseek-v3.2",
        "h_q": 64,
        "source": "me",
        "seed": 0,
        "forwards": [{"requests": entry, "occurred": 1} for entry in requests],
    }
    Path("drawn.json").write_text(json.dumps(drawn))
    assert run(["spot-check", "drawn.json", "--gpu", "cpu", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["forwards"], found["complete"]) == (2, 2)
    lines = [(line["shape"]["requests"], line["layer"], line["candidate"]) for line in found["lines"]]
    assert lines == [(entry, "dsa", name) for entry in requests for name in ("sparse_fwd", "with_kvcache")]
    assert all(line["predicted_us"] > 0 and line["measured_us"] > 0 for line in found["lines"])
    assert {rule["rule"] for rule in found["rules"]} >= {"policy", "always sparse_fwd", "always with_kvcache"}
    assert all(rule["worst"] >= 1 for rule in found["rules"])
    assert sorted(path.name for path in checkout.iterdir()) == ["db", "drawn.json", "policies"]


def test_chunk_sizes_are_told_with_the_size_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("chunks", *FLASH, "--prompt", "131072")
    told = as_json(capsys, *arguments)
    assert [entry["chunk_tokens"] for entry in told["sizes"]] == [1 << n for n in range(10, 17)]
    printed = output(capsys, *arguments)
    assert f"set {told['advice']['chunk_tokens']}: {told['advice']['reason']}" in " ".join(printed.split())
    by_size = {entry["chunk_tokens"]: entry["policy"] for entry in told["sizes"]}
    ratio = by_size[32768]["workspace_bytes"] / by_size[8192]["workspace_bytes"]
    time = percent(by_size[32768]["time_us"] / by_size[8192]["time_us"] - 1)
    assert f"32768 against 8192: {time} of time, {ratio:.2f} x the workspace" in printed


def test_chunk_sizes_for_several_prompts_at_a_time_a_distribution_and_a_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def times(*arguments: str) -> dict[int, float]:
        sizes = as_json(capsys, "chunks", *FLASH, *arguments)["sizes"]
        return {entry["chunk_tokens"]: entry["policy"]["time_us"] for entry in sizes}

    short, long = times("--prompt", "4096"), times("--prompt", "65536")
    mixed = times("--prompt", "4096:3", "--prompt", "65536:1")
    for chunk, us in mixed.items():
        assert us == pytest.approx((3 * short[chunk] + long[chunk]) / 4)
    together = times("--prompt", "50", "--concurrency", "4096")
    assert sorted(together) == [4096, 8192, 16384, 32768, 65536]  # smaller chunks have no token for each
    told = as_json(capsys, "chunks", *FLASH, "--trace", str(TRACE), "--concurrency", "4")
    assert "conversation.jsonl, arrivals at speed inf, concurrency 4" in told["prompts"]
    assert all(entry["policy"]["workspace_bytes"] > 0 for entry in told["sizes"])


REFUSALS = {
    "neither trace nor agents": (["traffic", *FLASH], 2, "pass --trace FILE or --agents N"),
    "both": ([*REPLAY, "--agents", "3"], 2, "pass --trace FILE or --agents N"),
    "no agents": (["traffic", *FLASH, "--agents", "0"], 2, "an agentic mix must have agents"),
    "negative turns": (["traffic", *FLASH, "--agents", "2", "--turns=-1"], 2, "'--turns': a count must be a whole"),
    "a draw for nothing": ([*REPLAY, "--spot-check", "3"], 2, "with --forwards FILE, --measure or both"),
    "a file without a draw": ([*REPLAY, "--forwards", "x.json"], 2, "pass --spot-check N"),
    "a measurement without a draw": ([*REPLAY, "--measure"], 2, "pass --spot-check N"),
    "a draw of none": ([*REPLAY, "--spot-check", "0", "--forwards", "x.json"], 2, "got 0"),
    "no trace": (["traffic", *FLASH, "--trace", "no.jsonl"], 2, "got no.jsonl: No such file"),
    "a policy as trace": (["traffic", *FLASH, "--trace", "policies/cpu.yaml"], 2, "line 1: not a request"),
    "an empty trace": (["traffic", *FLASH, "--trace", "/dev/null"], 2, "a trace must have a request"),
    "no chunk": ([*REPLAY, "--chunk", "0"], 2, "chunk_tokens=0"),
    "a huge chunk": ([*REPLAY, "--chunk", str(10**12)], 2, "a server must take 1 to 16777216 tokens"),
    "no concurrency": ([*REPLAY, "--concurrency", "0"], 2, "concurrency=0"),
    "no speed": ([*REPLAY, "--speed", "0"], 2, "speed must be above 0"),
    "a speed that is no number": ([*REPLAY, "--speed", "nan"], 2, "speed must be above 0"),
    "negative rest": ([*REPLAY, "--rest-us=-1"], 2, "rest_us must be microseconds"),
    "endless decoding": ([*REPLAY, "--decode-us", "inf"], 2, "decode_us must be microseconds"),
    "an unknown model": (["traffic", "--model", "v4", "--trace", str(TRACE)], 2, "model must be a known one"),
    "heads of another model": ([*REPLAY, "--h-q", "128"], 2, "got 128; accepted: 64"),
    "a gpu without a policy": (
        ["traffic", "--model", "deepseek-v3.2", "--gpu", "nvidia-l4", "--agents", "1"],
        1,
        "nvidia-l4",
    ),
    "measurements of another gpu": ([*REPLAY, "--measurements", "db/cpu.jsonl"], 1, "measured on cpu"),
    "a place that cannot be written": ([*REPLAY, "--record", "/proc/x"], 1, "/proc"),
    "a list that cannot be written": ([*REPLAY, "--spot-check", "1", "--forwards", "/proc/x"], 2, "must be writable"),
    "no list": (["spot-check", "no.json"], 2, "got no.json: No such file"),
    "a trace as list": (["spot-check", str(TRACE)], 2, "not a list of forwards"),
    "chunks of nothing": (["chunks", *FLASH], 2, "pass --prompt N or --trace FILE"),
    "chunks of both": (["chunks", *FLASH, "--prompt", "5", "--trace", str(TRACE)], 2, "one of the two"),
    "chunks with negative rest": (["chunks", *FLASH, "--prompt", "5", "--rest-us=-1"], 2, "--rest-us must be"),
    "chunks with a rest that is no number": (["chunks", *FLASH, "--prompt", "5", "--rest-us", "nan"], 2, "got nan"),
    "a prompt in words": (["chunks", *FLASH, "--prompt", "long"], 2, "got 'long'; accepted: 131072, 8192:3"),
    "an empty prompt": (["chunks", *FLASH, "--prompt", "0"], 2, "tokens and a weight above 0"),
    "a prompt beyond the model": (["chunks", *FLASH, "--prompt", "2000000"], 2, "1048576 tokens: got 2000000"),
    "a huge prompt": (["chunks", *FLASH, "--prompt", "9" * 5000], 2, "--prompt must"),
    "a weight that is none": (["chunks", *FLASH, "--prompt", "5:nan"], 2, "tokens and a weight above 0"),
    "more prompts than a chunk": (["chunks", *FLASH, "--prompt", "5", "--concurrency", "70000"], 2, "for each prompt"),
    "more parts than can be summed": (
        ["chunks", *FLASH, "--prompt", "1000000", "--concurrency", "900"],
        2,
        "at most 4194304 parts",
    ),
    "no prompts at a time": (["chunks", *FLASH, "--prompt", "5", "--concurrency", "0"], 2, "for each prompt"),
}


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], code: int, said: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in checkout.rglob("*"))
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.match(r"mla-tune: \S", captured.err)
    assert said in captured.err
    assert len(captured.err) < 700
    assert sorted(path for path in checkout.rglob("*")) == before


def test_a_spot_check_of_another_gpus_predictions_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, *REPLAY, "--spot-check", "1", "--forwards", "drawn.json")
    code = run(["spot-check", "drawn.json", "--policy", "policies/nvidia-h200.yaml"])
    captured = capsys.readouterr()
    assert code == 1
    assert "policies/nvidia-h200.yaml is for nvidia-h200, this machine is cpu" in captured.err
    assert captured.err.count("\n") == 1
