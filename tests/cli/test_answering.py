"""Who answers at the command line: the file, tables and provider of the engine's plugin, or why the engine's own stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla_tune.cli import run
from mla_tune.policy.codec import load_policy, write_policy
from mla_tune.runtime.dispatcher import Dispatcher
from mla_tune.sites.engines import Engine
from mla_tune.sites.site import HUGGING_FACE, MODELS
from tests import driver_stand_in
from tests.policy.strategies import anywhere, full_policy

ROOT = Path(__file__).parents[2]
H200 = ROOT / "policies" / "nvidia-h200.yaml"
V3_2 = ("--model", "deepseek-v3.2")
TRACE = str(ROOT / "tests" / "replay" / "conversation.jsonl")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and none of a server's variables."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("POLICY", "MODE", "ALLOW_MODELLED", "RANKS", "RECORD"):
        monkeypatch.delenv(f"MLA_TUNE_{name}", raising=False)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command printed; it must succeed and keep standard error empty."""
    capsys.readouterr()
    code = run(arguments)
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(output(capsys, *arguments, "--json"))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one line of a command that must fail and print nothing else."""
    capsys.readouterr()
    code = run(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return code, captured.err


def test_sglang_is_answered_by_the_policy_of_its_kernels_and_own_by_that_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = ("512", "128K", *V3_2, "--gpu", "h200")
    sglang, own = as_json(capsys, "lookup", *shape), as_json(capsys, "lookup", *shape, "--engine", "own")
    assert (sglang["answered_by"]["policy"], sglang["candidate"]) == ("nvidia-h200.sglang.yaml", "with_kvcache")
    assert (own["answered_by"]["policy"], own["candidate"]) == ("nvidia-h200.yaml", "sparse_fwd_fused")
    assert own["answered_by"]["provider"] == "own"
    assert sglang["answered_by"]["provider"] == load_policy(H200.with_name("nvidia-h200.sglang.yaml")).provider


@pytest.mark.parametrize("engine", ["vllm", "vllm-few-heads"])
def test_vllm_keeps_its_own_choice_where_nothing_was_measured_with_its_wheel(
    engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = as_json(capsys, "lookup", "512", "128K", *V3_2, "--gpu", "h200", "--engine", engine)
    incumbent = {"vllm": "sparse_fwd", "vllm-few-heads": "with_kvcache_mixed"}[engine]
    assert (told["candidate"], told["reason"], told["rule"]) == (incumbent, "fallback", "incumbent")
    assert "vLLM runs the flash_mla of its own wheel" in told["kept"]
    printed = output(capsys, "lookup", "512", "128K", *V3_2, "--gpu", "h200", "--engine", engine)
    assert "0 of 16 tables serve vllm" in printed.splitlines()[0]
    assert f"choice: {incumbent}, {engine}'s own, which stays: nothing serves it\n" in printed


def test_a_file_that_is_named_answers_vllm_by_vllms_tables(capsys: pytest.CaptureFixture[str]) -> None:
    shape = (4096, 131072, 1)
    for word, engine, h_q in (("vllm", Engine.VLLM, 128), ("vllm-few-heads", Engine.VLLM_FEW_HEADS, 64)):
        resolved = Dispatcher.load(H200).resolve(
            "prefill_attention", model="deepseek-v3.2", layer="dsa", h_q=h_q, engine=engine
        )
        told = as_json(
            capsys, "lookup", "4096", "128K", *V3_2, "--h-q", str(h_q), "--policy", str(H200), "--engine", word
        )
        assert told["candidate"] == resolved.choose(*shape)
        assert told["answered_by"]["place"] == "named"


def test_a_modelled_policy_answers_only_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("4096", "128K", *V3_2, "--gpu", "b200")
    kept, allowed = as_json(capsys, "lookup", *shape), as_json(capsys, "lookup", *shape, "--allow-modelled")
    assert (kept["rule"], kept["answered_by"]["evidence"], kept["answered_by"]["serving"]) == (
        "incumbent",
        "modelled",
        0,
    )
    assert "it is modelled, and must be measured" in kept["kept"]
    assert (allowed["rule"], allowed["kept"]) == ("policy", None)


FIRST = {
    "lookup": ("64", "8K", *V3_2),
    "explain": ("64", "8K", *V3_2),
    "policy": ("show",),
    "plan": (*V3_2, "--batches", "2"),
    "chunks": (*V3_2, "--prompt", "8K"),
    "traffic": (*V3_2, "--agents", "1", "--turns", "2"),
}


@pytest.mark.parametrize("command", FIRST)
def test_every_output_names_policy_gpu_provider_and_evidence_first(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    priced = command not in ("lookup", "policy")  # by measurements, of which an H200's take seconds to read
    gpu, file, of, whose = (
        ("cpu", "cpu.yaml", "cpu with 2 threads", "mla-tune")
        if priced
        else ("nvidia-h200", "nvidia-h200.sglang.yaml", "nvidia-h200 with 132 SMs", "sglang@0.5.23")
    )
    words = (command, *FIRST[command], "--gpu", gpu)
    shown = output(capsys, *words)
    told = as_json(capsys, *words)["answered_by"]
    assert (told["policy"], told["gpu"], told["evidence"]) == (file, gpu, "measured")
    assert (told["builds"], told["serving"], told["tables"]) == ("those of the policy", 20, 20)
    if command == "policy":  # the same facts, as the head of a screen
        head = shown.partition("\n\n")[0]
        for part in (gpu, file, f"kernels of {whose}", "20 of 20 tables serve sglang", "evidence  measured"):
            assert part in head
        return
    first, second, *_ = shown.splitlines()
    assert first.startswith(f"sglang on {gpu}: {file} (shipped, sha256 ")
    assert f"measured for {of}, kernels of {whose}" in first
    assert "20 of 20 tables serve sglang" in first
    assert second.startswith("answered for a server that has the builds of this policy")


@pytest.mark.parametrize("command", FIRST)
def test_without_a_gpu_one_must_be_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refusal(capsys, command, *FIRST[command])
    assert code == 2
    assert "--gpu must name the server's GPU where none is in this machine; accepted: h20, h100, h200" in line


CONTRADICTIONS = {
    "another gpu's file": (
        ["--gpu", "h200", "--policy", str(ROOT / "policies" / "cpu.yaml")],
        "is for cpu, --gpu names nvidia-h200",
    ),
    "an unknown engine": (["--gpu", "h200", "--engine", "trtllm"], "accepted: sglang, vllm, vllm-few-heads, own"),
    "as served with a file": (["--as-served", "--policy", str(H200)], "set MLA_TUNE_POLICY"),
    "as served with a wish": (["--as-served", "--allow-modelled"], "MLA_TUNE_ALLOW_MODELLED instead"),
    "as served on a gpu that is not here": (["--as-served", "--gpu", "b200"], "got --gpu b200, here is no NVIDIA GPU"),
}


@pytest.mark.parametrize(("arguments", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_refused_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refusal(capsys, "lookup", "64", "8K", *V3_2, *arguments)
    assert code == 2
    assert said in line


def test_a_file_without_a_table_of_the_engine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import msgspec

    policy = load_policy(H200)
    few = tuple(table for table in policy.tables if table.engine == Engine.VLLM)
    write_policy(tmp_path / "vllms.yaml", msgspec.structs.replace(policy, tables=few))
    named = ("lookup", "64", "8K", *V3_2, "--policy", str(tmp_path / "vllms.yaml"))
    code, line = refusal(capsys, *named, "--engine", "sglang")
    assert code == 2
    assert "--policy must have tables that sglang reads" in line
    assert "has those of vllm alone" in line
    assert as_json(capsys, *named, "--engine", "vllm")["rule"] == "policy"


def test_a_shown_policy_has_the_tables_that_the_engine_reads(capsys: pytest.CaptureFixture[str]) -> None:
    def engines(*arguments: str) -> set[str]:
        return {table.get("engine", "sglang") for table in as_json(capsys, "policy", "show", *arguments)["tables"]}

    assert engines("--gpu", "h200") == {"sglang"}
    assert engines("--policy", str(H200)) == {str(engine) for engine in Engine}
    assert engines("--policy", str(H200), "--engine", "vllm") <= {"sglang", "vllm", "vllm-few-heads"}


def test_the_software_of_a_measurement_is_shown_as_context(capsys: pytest.CaptureFixture[str]) -> None:
    measured_with = load_policy(H200).environment
    shown = output(capsys, "policy", "show", "--policy", str(H200))
    context = f"driver {measured_with.driver}, torch {measured_with.torch}, triton {measured_with.triton}"
    assert f"context   {context} (no condition)" in shown


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_the_id_of_a_checkpoint_is_its_models_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = HUGGING_FACE[name]
    by_name = ("--model", config.name, "--h-q", str(config.heads[0]))
    for shape in (("16", "8K"), ("2048", "128K")):
        of_id = as_json(capsys, "lookup", *shape, "--gpu", "h200", "--model", name)
        assert of_id == as_json(capsys, "lookup", *shape, "--gpu", "h200", *by_name)
        assert of_id["rule"] == "policy"


def test_a_model_without_tables_is_told_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refusal(capsys, "lookup", "64", "8K", "--gpu", "h200", "--model", "deepseek-ai/DeepSeek-V4.1-Flash")
    assert code == 2
    assert "its layers of compress ratios 1 and 2 are no site of any measurement yet" in line
    assert all(model in line for model in MODELS)


def test_glm_5_is_priced_with_its_own_layers(capsys: pytest.CaptureFixture[str]) -> None:
    def total_us(model: str) -> float:
        told = as_json(capsys, "chunks", "--gpu", "cpu", "--model", model, "--h-q", "64", "--prompt", "2K")
        return float(told["sizes"][0]["incumbent"]["time_us"])

    assert total_us("zai-org/GLM-5") / total_us("deepseek-v3.2") == pytest.approx(78 / 61, rel=0.02)


COUNTS = {
    "turns": ("traffic", *V3_2, "--gpu", "h200", "--agents", "1", "--turns", "1K0"),
    "agents": ("traffic", *V3_2, "--gpu", "h200", "--agents", "-1K"),
    "concurrency": ("traffic", *V3_2, "--gpu", "h200", "--trace", TRACE, "--concurrency", "two"),
    "drawn forwards": ("traffic", *V3_2, "--gpu", "h200", "--trace", TRACE, "--spot-check", "1.5K"),
    "batches": ("plan", *V3_2, "--gpu", "h200", "--batches", "many"),
    "prompts at a time": ("chunks", *V3_2, "--gpu", "h200", "--prompt", "8K", "--concurrency", "x"),
    "points": ("validate", "--gpu", "cpu", "--points", "1e3"),
    "most tokens of a probe": ("probe", "--gpu", "cpu", "--max", "1e3"),
    "repetitions": ("sweep", "--gpu", "cpu", "--repeat", "1e3"),
    "recorded rounds": ("trace", "64", "8K", *V3_2, "--gpu", "cpu", "--repeats", "1e3"),
}


@pytest.mark.parametrize("arguments", COUNTS.values(), ids=COUNTS)
def test_every_count_is_written_alike(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refusal(capsys, *arguments)
    assert code == 2
    assert "accepted: 131072, 128K or 1M" in line


def test_counts_with_units_are_those_numbers_in_lists_too(capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("plan", *V3_2, "--gpu", "cpu", "--batches", "2")
    assert as_json(capsys, *plan, "--context", "64K:128K") == as_json(capsys, *plan, "--context", "65536:131072")
    chunks = ("chunks", *V3_2, "--gpu", "cpu")
    assert (
        as_json(capsys, *chunks, "--prompt", "4K:3")["sizes"] == as_json(capsys, *chunks, "--prompt", "4096:3")["sizes"]
    )


SERVED = ("lookup", "512", "128K", *V3_2, "--as-served")


def test_as_served_without_a_gpu_says_that_the_engines_own_choice_stays(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, *SERVED)
    assert printed.startswith("sglang on no GPU: for_this_gpu needs a visible NVIDIA GPU")
    assert "choice: with_kvcache, sglang's own, which stays: nothing serves it" in printed


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H200 and none of the kernel libraries."""
    driver_stand_in.install(monkeypatch, driver_stand_in.H200)


@pytest.mark.usefixtures("h200")
def test_as_served_asks_for_the_builds_that_are_installed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = output(capsys, *SERVED)
    first, second, *rest = printed.splitlines()
    # The schedule, which depends on no library, serves alone: by our own policy, since all of SGLang's depends on SGLang.
    assert first.startswith("sglang on nvidia-h200 with 132 SMs: nvidia-h200.yaml (shipped, sha256 ")
    assert "6 of 20 tables serve sglang" in first
    assert "passed over nvidia-h200.sglang.yaml: sgl-flash-mla must be 1.0.0: it is not installed" in first
    assert second.startswith("as served on this machine, by what is installed and set: ")
    assert rest[0].startswith("for context, no mismatch: torch ")
    assert "measured with 2.11.0+cu130" in rest[0]
    assert rest[-1].startswith("choice: with_kvcache, sglang's own, which stays: ")
    assert rest[-1].endswith("sgl-flash-mla must be 1.0.0: it is not installed")
    told = as_json(capsys, *SERVED)
    assert (told["answered_by"]["serving"], told["answered_by"]["builds"]) == (6, "installed")
    # Asked about a server that has the builds of the policy, the same machine has another answer.
    assert as_json(capsys, "lookup", "512", "128K", *V3_2)["rule"] == "policy"


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("variables", "rule", "candidate", "said"),
    [
        ({"POLICY": str(H200)}, "policy", "sparse_fwd", None),
        ({"POLICY": str(H200), "MODE": "pin:with_kvcache"}, "pin", "with_kvcache", None),
        ({"MODE": "off"}, "off", "with_kvcache", "MLA_TUNE_MODE=off"),
        ({"POLICY": str(H200), "MODE": "off"}, "off", "with_kvcache", "MLA_TUNE_MODE=off"),
        ({"MODE": "fast"}, "incumbent", "with_kvcache", "MLA_TUNE_MODE must be a known mode: got 'fast'"),
        ({"POLICY": "no.yaml"}, "incumbent", "with_kvcache", "no.yaml: No such file"),
        (
            {"POLICY": str(H200.with_name("nvidia-b200.yaml")), "ALLOW_MODELLED": "0"},
            "incumbent",
            "with_kvcache",
            "it is modelled, and must be measured",
        ),
    ],
    ids=["named", "pinned", "off", "named and off", "no mode", "no file", "modelled refused"],
)
def test_as_served_honours_the_variables_of_a_server(
    variables: dict[str, str],
    rule: str,
    candidate: str,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"MLA_TUNE_{name}", value)
    told = as_json(capsys, *SERVED)
    assert (told["rule"], told["candidate"]) == (rule, candidate)
    assert said is None or said in told["kept"]
    printed = output(capsys, *SERVED)
    assert said is None or said in printed
    assert all(f"MLA_TUNE_{name}={value}" in printed.splitlines()[1] for name, value in variables.items())


@pytest.mark.usefixtures("h200")
def test_the_users_policy_answers_before_the_shipped_one_as_in_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLA_TUNE_HOME", str(tmp_path))
    (tmp_path / "policies").mkdir()
    file = tmp_path / "policies" / "nvidia-h200.yaml"
    write_policy(file, anywhere(full_policy()))
    for arguments in (SERVED, SERVED[:-1]):
        told = as_json(capsys, *arguments)["answered_by"]
        assert (told["policy"], told["place"]) == (str(file), "user")
    code, line = refusal(capsys, *SERVED, "--gpu", "b200")
    assert code == 2
    assert "got --gpu b200, here is nvidia-h200" in line
