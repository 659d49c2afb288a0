"""Loading, resolving and falling back: everything that may go wrong goes wrong before serving."""

from __future__ import annotations

import logging
import re
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mla_tune.errors import EnvironmentMismatchError, MlaTuneError, PolicyError, UsageError
from mla_tune.hardware.nvml import GpuIdentity
from mla_tune.policy import search
from mla_tune.policy.codec import digest, dump_policy, write_policy
from mla_tune.policy.schema import Gpu, Limit, Policy
from mla_tune.runtime.dispatcher import Dispatcher, Reason
from mla_tune.sites.engines import Engine, model_incumbent
from mla_tune.sites.site import FORWARD, MODELS, SiteName
from tests.policy.strategies import KEYS, anywhere, full_policy, modelled_policy, policy, table

H200 = GpuIdentity("NVIDIA H200", "nvidia-h200", 132, "580.1")
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLA_TUNE_POLICY", raising=False)


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    """A valid policy with a table for everything."""
    path = tmp_path / "nvidia-h200.yaml"
    write_policy(path, anywhere(full_policy()))
    return path


def see_gpu(monkeypatch: pytest.MonkeyPatch, gpu: GpuIdentity | None, shipped: Path) -> None:
    """Let this process see ``gpu`` and the policies in the folder ``shipped``."""
    monkeypatch.setattr("mla_tune.hardware.nvml.detect_gpu", lambda: gpu)
    monkeypatch.setattr("mla_tune.policy.search._shipped_files", lambda: sorted(shipped.glob("*.yaml")))


def depending(*builds: str, **changes: Any) -> Policy:
    """A policy whose one table depends on these builds."""
    return policy(table(builds=tuple(sorted(builds))), **changes)


INSTALLED = f"msgspec=={version('msgspec')}"


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_every_table_of_a_policy_resolves(
    key: tuple[SiteName, str, int | None, str, Engine], policy_file: Path
) -> None:
    site, model, h_q, layer, engine = key
    found = Dispatcher.load(policy_file).resolve(site, model=model, layer=layer, h_q=h_q, engine=engine)
    assert found.table is not None
    assert (found.table.site, found.table.model, found.table.h_q, found.table.layer, found.table.engine) == key
    assert found.fallback is None


@pytest.mark.parametrize("engine", [Engine.VLLM, Engine.VLLM_FEW_HEADS])
def test_an_engine_that_launches_and_chooses_as_sglang_does_reads_its_tables(engine: Engine, policy_file: Path) -> None:
    found = Dispatcher.load(policy_file).resolve(
        "prefill_attention", model="deepseek-v4-flash", layer="c4a", engine=engine
    )
    assert found.table is not None
    assert found.table.engine == Engine.SGLANG


@pytest.mark.parametrize(
    ("engine", "incumbent"), [(Engine.VLLM, "sparse_fwd"), (Engine.VLLM_FEW_HEADS, "with_kvcache_mixed")]
)
def test_an_engine_of_its_own_kind_never_reads_anothers_table(engine: Engine, incumbent: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    sglang = table(model="deepseek-v3.2", h_q=64, layer="dsa")
    path.write_bytes(dump_policy(policy(sglang)))
    dispatcher = Dispatcher.load(path, fallback="incumbent")
    found = dispatcher.resolve("prefill_attention", model="deepseek-v3.2", layer="dsa", h_q=64, engine=engine)
    assert found.table is None
    assert {found.choose(q, 1 << 20, 1) for q in (1, 64, 8192)} == {found.incumbent} == {incumbent}
    assert f"in {engine}: got layer dsa with h_q 64; accepted: no layer" in dispatcher.fallbacks[0]


def test_without_h_q_the_model_s_own_heads_are_taken(policy_file: Path) -> None:
    dispatcher = Dispatcher.load(policy_file)
    for layer in ("c4a", FORWARD):
        assert dispatcher.resolve("prefill_attention", model="deepseek-v4-pro", layer=layer).h_q == 128
        assert dispatcher.resolve("prefill_attention", model="deepseek-v4-pro", layer=layer, h_q=64).h_q == 64


def test_heads_play_no_role_for_indexer_metadata(policy_file: Path) -> None:
    found = Dispatcher.load(policy_file).resolve("indexer_metadata", model="deepseek-v3.2", layer="dsa", h_q=128)
    assert found.h_q is None
    assert found.choose(100, 100_000, 1) == "jit"


def test_a_dispatcher_knows_its_file_and_its_digest(policy_file: Path) -> None:
    dispatcher = Dispatcher.load(policy_file)
    assert dispatcher.source == str(policy_file)
    assert dispatcher.digest == digest(policy_file.read_bytes())
    assert dispatcher.policy == anywhere(full_policy())
    assert dispatcher.fallbacks == ()


@pytest.mark.parametrize("text", [None, "schema: 99\n", "not: [a policy"])
def test_a_file_that_does_not_load_raises_or_falls_back(
    text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        Dispatcher.load(path)
    dispatcher = Dispatcher.load(path, fallback="incumbent")
    assert dispatcher.fallbacks == (str(caught.value),)
    assert dispatcher.digest == ""
    found = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    assert found.choose(100, 100_000, 1) == "sparse_fwd"
    assert found.fallback == str(caught.value)
    assert [record.getMessage() for record in caplog.records] == [f"the engine's own choice is kept: {caught.value}"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("site", SiteName)
def test_a_fallback_answers_the_incumbent_of_the_site_and_model_for_all_integers(model: str, site: SiteName) -> None:
    dispatcher = Dispatcher(None, source="nothing was loaded")
    found = dispatcher.resolve(site, model=model, layer=FORWARD)
    assert {found.choose(q, kv, 1) for q in (-1, 0, 1 << 62) for kv in (-1, 0, 1 << 62)} == {
        model_incumbent(Engine.SGLANG, site, MODELS[model])
    }
    assert found.explain(1, 1, 1).reason is Reason.FALLBACK


@pytest.mark.parametrize(
    ("layer", "h_q", "error"),
    [("dsa", None, UsageError), ("c4a", 32, UsageError), ("c128a", None, PolicyError), (FORWARD, 64, PolicyError)],
)
def test_a_miss_at_resolve_raises_or_falls_back_and_is_logged_once(
    layer: str, h_q: int | None, error: type[MlaTuneError], caplog: pytest.LogCaptureFixture
) -> None:
    strict = Dispatcher(policy(), source="p.yaml")
    with pytest.raises(error) as caught:
        strict.resolve("prefill_attention", model="deepseek-v4-flash", layer=layer, h_q=h_q)
    assert strict.fallbacks == ()
    dispatcher = Dispatcher(policy(), source="p.yaml")
    for _ in range(2):
        found = dispatcher.resolve(
            "prefill_attention", model="deepseek-v4-flash", layer=layer, h_q=h_q, fallback="incumbent"
        )
        assert found.choose(20, 100_000, 1) == "sparse_fwd"
        assert found.fallback == str(caught.value)
    assert dispatcher.fallbacks == (str(caught.value),)
    assert len(caplog.records) == 1


def test_the_fallback_given_at_load_holds_at_resolve(policy_file: Path) -> None:
    dispatcher = Dispatcher.load(policy_file, fallback="incumbent")
    assert dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a", h_q=32).fallback is not None


def test_a_missing_table_names_those_that_are_there() -> None:
    with pytest.raises(
        PolicyError, match=r"^p\.yaml must have .*: got layer c128a with h_q 64; accepted: c4a with h_q 64;"
    ):
        Dispatcher(policy(), source="p.yaml").resolve("prefill_attention", model="deepseek-v4-flash", layer="c128a")


def test_a_table_whose_candidates_are_all_limited_falls_back_like_any_miss() -> None:
    limits = tuple(Limit(candidate=name, num_qo_tokens=9000) for name in ("sparse_fwd", "with_kvcache"))
    dispatcher = Dispatcher(policy(table(limits=limits)), source="p.yaml")
    with pytest.raises(PolicyError, match="got none above num_qo_tokens=9000"):
        dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    found = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a", fallback="incumbent")
    assert found.choose(10_000, 100_000, 1) == "sparse_fwd"


@pytest.mark.parametrize(
    ("site", "model", "layer"),
    [
        ("lm_head", "deepseek-v4-pro", "c4a"),
        ("prefill_attention", "gpt", "c4a"),
        ("prefill_attention", "deepseek-v4-pro", "x"),
    ],
)
def test_an_unknown_word_is_the_caller_s_mistake_whatever_the_fallback(site: str, model: str, layer: str) -> None:
    for dispatcher in (Dispatcher(None, source="off"), Dispatcher(policy(), source="p.yaml")):
        with pytest.raises(UsageError, match="; accepted: "):
            dispatcher.resolve(site, model=model, layer=layer, fallback="incumbent")


def test_an_unknown_fallback_word_is_refused_everywhere(policy_file: Path) -> None:
    for call in (
        lambda: Dispatcher.load(policy_file, fallback="yes"),  # type: ignore[arg-type]
        lambda: Dispatcher.for_this_gpu(fallback=True),  # type: ignore[arg-type]
        lambda: Dispatcher(policy(), source="p").resolve("x", model="y", layer="z", fallback="no"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match="accepted: None, 'incumbent'"):
            call()


def test_an_unknown_provider_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="provider must be a known word: got 'trt'; accepted: own, sglang, vllm"):
        Dispatcher.for_this_gpu(fallback="incumbent", provider="trt")


def test_a_modelled_policy_says_so_at_load(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Dispatcher(modelled_policy(), source="p.yaml")
    assert [record.getMessage() for record in caplog.records] == [
        "p.yaml is modelled: none of its thresholds was measured on nvidia-b200"
    ]
    assert dispatcher.evidence == "modelled"


def test_a_measured_policy_says_so_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="mla_tune"):
        dispatcher = Dispatcher(policy(), source="p.yaml")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "p.yaml is measured on nvidia-h200")
    ]
    assert dispatcher.evidence == "measured"
    assert Dispatcher(None, source="off", fallback="incumbent").evidence == "none"


def test_threads_that_miss_together_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Dispatcher(policy(), source="p.yaml", fallback="incumbent")

    def miss() -> None:
        dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c128a")

    threads = [threading.Thread(target=miss) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(dispatcher.fallbacks) == len(caplog.records) == 1


def test_without_a_gpu_it_raises_or_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(EnvironmentMismatchError, match="needs a visible NVIDIA GPU"):
        Dispatcher.for_this_gpu()
    dispatcher = Dispatcher.for_this_gpu(fallback="incumbent")
    assert len(dispatcher.fallbacks) == 1
    found = dispatcher.resolve("prefill_attention", model="deepseek-v3.2", layer="dsa")
    assert found.choose(100, 1000, 1) == "with_kvcache"


def test_the_shipped_policy_of_the_visible_gpu_is_taken(
    monkeypatch: pytest.MonkeyPatch, policy_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    see_gpu(monkeypatch, H200, policy_file.parent)
    dispatcher = Dispatcher.for_this_gpu()
    assert dispatcher.policy == anywhere(full_policy())
    assert dispatcher.digest == digest(policy_file.read_bytes())
    assert caplog.records == []


@pytest.mark.parametrize("provider", ["own", "sglang"])
def test_an_engine_is_served_by_what_was_measured_with_its_own_kernels_where_that_ships(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policies = {"own": anywhere(policy()), "sglang": anywhere(policy(provider="sglang@0.5.23"))}
    see_gpu(monkeypatch, H200, tmp_path)
    write_policy(tmp_path / "nvidia-h200.yaml", policies["own"])
    assert Dispatcher.for_this_gpu(provider=provider).policy == policies["own"]
    write_policy(tmp_path / "nvidia-h200.sglang.yaml", policies["sglang"])
    assert Dispatcher.for_this_gpu(provider=provider).policy == policies[provider]


def test_a_gpu_without_a_shipped_policy_names_those_there_are(
    monkeypatch: pytest.MonkeyPatch, policy_file: Path
) -> None:
    see_gpu(monkeypatch, GpuIdentity("NVIDIA L4", "nvidia-l4", 58, "580.1"), policy_file.parent)
    with pytest.raises(
        EnvironmentMismatchError, match=r"none is for nvidia-l4, in .* or among the shipped ones \(nvidia-h200\);"
    ):
        Dispatcher.for_this_gpu()
    assert len(Dispatcher.for_this_gpu(fallback="incumbent").fallbacks) == 1


@pytest.mark.parametrize(
    ("shipped", "message"),
    [
        (
            policy(gpu=Gpu(sku="nvidia-h200", sm_count=78)),
            r"must be nvidia-h200 with 78 SMs: got nvidia-h200 with 132 SMs;",
        ),
        (
            policy(gpu=Gpu(sku="nvidia-h20", sm_count=132)),
            r"must be nvidia-h20 with 132 SMs: got nvidia-h200 with 132",
        ),
        (depending("msgspec==0.0.1"), rf"msgspec must be 0\.0\.1: got {re.escape(version('msgspec'))};"),
        (depending(INSTALLED, "nowhere==1"), r"nowhere must be 1: it is not installed;"),
        (depending(INSTALLED, "flash-mla==unknown"), r"flash-mla was measured in an unknown version;"),
    ],
    ids=["SM count", "SKU", "release", "missing", "unknown"],
)
def test_another_machine_than_the_measured_one_raises_or_falls_back(
    shipped: Policy, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_policy(tmp_path / "nvidia-h200.yaml", shipped)
    see_gpu(monkeypatch, H200, tmp_path)
    with pytest.raises(EnvironmentMismatchError, match=message) as caught:
        Dispatcher.for_this_gpu()
    dispatcher = Dispatcher.for_this_gpu(fallback="incumbent")
    assert dispatcher.fallbacks == (str(caught.value),)
    assert dispatcher.policy is None


def test_the_measured_build_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_policy(tmp_path / "nvidia-h200.yaml", depending(INSTALLED))
    see_gpu(monkeypatch, H200, tmp_path)
    assert Dispatcher.for_this_gpu().policy == depending(INSTALLED)


def test_a_policy_that_the_user_names_is_used_with_a_warning_about_what_differs(
    monkeypatch: pytest.MonkeyPatch, policy_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    see_gpu(monkeypatch, GpuIdentity("NVIDIA H20", "nvidia-h20", 78, "580.1"), policy_file.parent / "nothing")
    monkeypatch.setenv("MLA_TUNE_POLICY", str(policy_file))
    dispatcher = Dispatcher.for_this_gpu()
    assert dispatcher.policy == anywhere(full_policy())
    assert dispatcher.fallbacks == ()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "got nvidia-h20 with 78 SMs" in caplog.text


def test_a_policy_that_the_user_names_and_is_not_there_raises_or_falls_back(
    monkeypatch: pytest.MonkeyPatch, policy_file: Path
) -> None:
    see_gpu(monkeypatch, H200, policy_file.parent)
    monkeypatch.setenv("MLA_TUNE_POLICY", "missing.yaml")
    with pytest.raises(PolicyError, match="missing"):
        Dispatcher.for_this_gpu()
    assert Dispatcher.for_this_gpu(fallback="incumbent").policy is None


def test_off_keeps_the_incumbent_everywhere(monkeypatch: pytest.MonkeyPatch, policy_file: Path) -> None:
    see_gpu(monkeypatch, H200, policy_file.parent)
    monkeypatch.setenv("MLA_TUNE_POLICY", "off")
    dispatcher = Dispatcher.for_this_gpu()
    found = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    assert found.choose(100, 100_000, 1) == "sparse_fwd"
    assert dispatcher.fallbacks == ("MLA_TUNE_POLICY=off",)


def test_the_environment_is_not_read_after_load(monkeypatch: pytest.MonkeyPatch, policy_file: Path) -> None:
    see_gpu(monkeypatch, H200, policy_file.parent)
    dispatcher = Dispatcher.for_this_gpu()
    monkeypatch.setenv("MLA_TUNE_POLICY", "off")
    found = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    assert found.choose(100, 100_000, 1) == "with_kvcache"


def test_a_checkout_ships_the_policies_of_its_own_folder() -> None:
    assert list(search.packaged_policies()) == sorted(path.stem for path in (CHECKOUT / "policies").glob("*.yaml"))
    for name, file in search.packaged_policies().items():
        assert search.policy_file(*name.split(".")).path == file
