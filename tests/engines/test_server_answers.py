"""The command line gives what the plugin's dispatcher gives beside the released engine, at every site, model and layer."""

from __future__ import annotations

import json
from itertools import product

import pytest

from mla_tune.cli import run
from mla_tune.cli.answering import Question, answering
from mla_tune.integrations.sglang.sglang_state import RELEASES as SGLANG_RELEASES
from mla_tune.integrations.vllm.vllm_state import RELEASES as VLLM_RELEASES
from mla_tune.runtime.dispatcher import Dispatcher, Resolved
from mla_tune.sites.engines import Engine
from mla_tune.sites.site import FORWARD, MODELS, SiteName
from tests import driver_stand_in
from tests.engines.conftest import Install

SHAPES = [
    (num_qo_tokens, max(num_qo_tokens, context * num_reqs), num_reqs)
    for num_qo_tokens, context, num_reqs in product(
        (64, 150, 400, 1000, 2500, 8192, 30000), (2048, 8192, 40000, 131072, 1 << 20), (1, 3, 16, 64)
    )
]
PLACES = [
    (site, model.name, layer, h_q)
    for site in SiteName
    for model in MODELS.values()
    for layer in (*model.site_layers(site), FORWARD)
    for h_q in (model.heads if site is SiteName.PREFILL_ATTENTION else (None,))
]


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's machine."""
    driver_stand_in.install(monkeypatch, driver_stand_in.H200)


def served(provider: str, engine: Engine) -> dict[tuple[object, ...], Resolved]:
    """What the plugin of ``provider`` resolves on this machine."""
    dispatcher = Dispatcher.for_this_gpu(fallback="incumbent", provider=provider)
    return {
        (site, model, layer, h_q): dispatcher.resolve(site, model=model, layer=layer, h_q=h_q, engine=engine)
        for site, model, layer, h_q in PLACES
    }


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(
    ("word", "provider", "release", "engine"),
    [
        ("sglang", "sglang", SGLANG_RELEASES[-1], Engine.SGLANG),
        ("vllm", "vllm", VLLM_RELEASES[-1], Engine.VLLM),
        ("vllm-few-heads", "vllm", VLLM_RELEASES[-1], Engine.VLLM_FEW_HEADS),
        ("own", "own", SGLANG_RELEASES[-1], Engine.OWN),
    ],
)
def test_a_lookup_answers_what_the_plugin_serves_beside_the_released_engine(
    word: str, provider: str, release: str, engine: Engine, install: Install
) -> None:
    install("vllm" if provider == "vllm" else "sglang", release)
    in_the_server = served(provider, engine)
    found = answering(Question(word, "h200"))
    for place, expected in in_the_server.items():
        site, model, layer, h_q = place
        told = found.resolve(str(site), str(model), str(layer), h_q if isinstance(h_q, int) else None)
        assert (told.rule, told.incumbent) == (expected.rule, expected.incumbent), place
        assert [told.choose(*shape) for shape in SHAPES] == [expected.choose(*shape) for shape in SHAPES], place


@pytest.mark.usefixtures("h200")
def test_the_policy_of_our_own_kernels_would_answer_otherwise(install: Install) -> None:
    """What a lookup once answered for SGLang."""
    install("sglang", SGLANG_RELEASES[-1])
    place = (SiteName.PREFILL_ATTENTION, "deepseek-v3.2", "dsa", 128)
    in_the_server = served("sglang", Engine.SGLANG)[place]
    ours = served("own", Engine.SGLANG)[place]
    differing = [shape for shape in SHAPES if in_the_server.choose(*shape) != ours.choose(*shape)]
    assert len(differing) > len(SHAPES) // 10


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("flag", [("--gpu", "h200"), ("--as-served",)], ids=["asked", "as served"])
def test_the_printed_candidate_is_the_plugins(
    flag: tuple[str, ...], install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("sglang", SGLANG_RELEASES[-1])
    for (site, model, layer, h_q), expected in list(served("sglang", Engine.SGLANG).items())[::3]:
        for num_qo_tokens, kv_tokens, num_reqs in SHAPES[5::45]:
            words = ["lookup", str(num_qo_tokens), str(kv_tokens), "--num-reqs", str(num_reqs), "--site", str(site)]
            words += ["--model", str(model), "--layer", str(layer), *(["--h-q", str(h_q)] if h_q else []), *flag]
            assert run([*words, "--json"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert told["candidate"] == expected.choose(num_qo_tokens, kv_tokens, num_reqs)
            assert (told["rule"], told["answered_by"]["policy"]) == ("policy", "nvidia-h200.sglang.yaml")
