"""Who decides: the user's setting for the engine, then MLA_TUNE_*, then the policy, then the incumbent."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_tune.errors import EnvironmentMismatchError, PolicyError, UsageError
from mla_tune.hardware.nvml import GpuIdentity
from mla_tune.policy.codec import write_policy
from mla_tune.policy.schema import Limit
from mla_tune.runtime.dispatcher import Dispatcher, Reason, Rule
from mla_tune.runtime.switches import RankMismatch, Switches
from mla_tune.sites.candidates import CANDIDATES
from mla_tune.sites.site import SiteName
from tests.policy.strategies import anywhere, full_policy, modelled_policy, policy, table

H200 = GpuIdentity("NVIDIA H200", "nvidia-h200", 132, "580.1")
VARIABLES = ("POLICY", "MODE", "ALLOW_MODELLED", "RANKS", "RECORD")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H200 whose shipped policy has every table, and no switch set."""
    for name in VARIABLES:
        monkeypatch.delenv(f"MLA_TUNE_{name}", raising=False)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    write_policy(shipped / "nvidia-h200.yaml", anywhere(full_policy()))
    monkeypatch.setattr("mla_tune.hardware.nvml.detect_gpu", lambda: H200)
    monkeypatch.setattr("mla_tune.policy.search._shipped_files", lambda: sorted(shipped.glob("*.yaml")))


def rule(engine: str | None, **settings: str) -> Rule:
    """Who decides V4's attention under these settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"MLA_TUNE_{name}", value)
        dispatcher = Dispatcher.for_this_gpu(fallback="incumbent")
    found = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a", engine_setting=engine)
    assert (found.table is None) == (found.fallback is not None) == (found.rule not in (Rule.PIN, Rule.POLICY))
    return found.rule


ENGINE = {None: None, "set": "SGLANG_OPT_FLASHMLA_SPARSE_PREFILL=0"}
MODE = {"unset": {}, "auto": {"MODE": "auto"}, "off": {"MODE": "off"}, "pin": {"MODE": "pin:with_kvcache"}}
POLICY = {"shipped": {}, "off": {"POLICY": "off"}, "missing": {"POLICY": "/nonexistent/policy.yaml"}}


def expected(engine: str | None, mode: str, file: str) -> Rule:
    """The documented order, read from the top."""
    if engine is not None:
        return Rule.ENGINE
    if mode == "off" or file == "off":
        return Rule.OFF
    if file == "missing":
        return Rule.INCUMBENT  # a pin needs a policy as well: only that knows the limits
    return Rule.PIN if mode == "pin" else Rule.POLICY


@pytest.mark.parametrize(("engine", "mode", "file"), list(product(ENGINE, MODE, POLICY)))
def test_the_first_setting_that_applies_decides(engine: str | None, mode: str, file: str) -> None:
    assert rule(ENGINE[engine], **MODE[mode], **POLICY[file]) is expected(engine, mode, file)


@pytest.mark.parametrize("allowed", [None, "1", "true", "0", "No"])
@pytest.mark.parametrize("named", [False, True])
def test_a_modelled_policy_serves_where_it_is_allowed_or_named_and_not_forbidden(
    allowed: str | None, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shipped" / "nvidia-h200.yaml"
    write_policy(path, anywhere(modelled_policy(gpu=full_policy().gpu)))
    if named:
        monkeypatch.setenv("MLA_TUNE_POLICY", str(path))
    if allowed is not None:
        monkeypatch.setenv("MLA_TUNE_ALLOW_MODELLED", allowed)
    if allowed in ("1", "true") or (named and allowed is None):
        assert Dispatcher.for_this_gpu().policy is not None
        return
    with pytest.raises(
        EnvironmentMismatchError,
        match=r"0 of 1 tables serve own; it is modelled, and must be measured; MLA_TUNE_ALLOW_MODELLED=1 serves it",
    ):
        Dispatcher.for_this_gpu()
    assert Dispatcher.for_this_gpu(fallback="incumbent").policy is None


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("MODE", "on", "accepted: auto, off, or pin: with one of sparse_fwd, sparse_fwd_fused, "),
        ("MODE", "pin:", "got ''; accepted: sparse_fwd"),
        ("MODE", "pin:sparse", "got 'sparse'; accepted: sparse_fwd"),
        ("MODE", "pin:sparse_fwd,with_kvcache", "one candidate per site"),
        ("ALLOW_MODELLED", "maybe", "accepted: 1, true"),
        ("RANKS", "ignore", "accepted: refuse, incumbent"),
    ],
)
def test_a_value_that_means_nothing_is_refused_or_keeps_the_incumbent(
    name: str, value: str, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"MLA_TUNE_{name}", value)
    with pytest.raises(UsageError, match=f"^MLA_TUNE_{name} must") as caught:
        Dispatcher.for_this_gpu()
    assert accepted in str(caught.value)
    assert Dispatcher.for_this_gpu(fallback="incumbent").fallbacks == (str(caught.value),)


@given(st.sets(st.sampled_from(sorted(SiteName))))
def test_a_mode_reads_back_what_it_says(sites: set[SiteName]) -> None:
    pins = sorted(CANDIDATES[site][0].name for site in sites)
    mode = "pin:" + ",".join(pins) if pins else "auto"
    switches = Switches.from_environment({"MLA_TUNE_MODE": mode})
    assert switches.mode == mode
    assert [switches.pin(site) for site in SiteName] == [
        CANDIDATES[site][0].name if site in sites else None for site in SiteName
    ]


def test_an_empty_environment_gives_the_defaults() -> None:
    empty = dict.fromkeys((f"MLA_TUNE_{name}" for name in VARIABLES), " ")
    assert Switches.from_environment({}) == Switches.from_environment(empty) == Switches()
    assert Switches().on_rank_mismatch is RankMismatch.REFUSE


@given(st.integers(-5, 1 << 62), st.integers(-5, 1 << 62), st.sampled_from(("sparse_fwd", "with_kvcache")))
def test_a_pinned_candidate_is_answered_for_every_shape_up_to_its_limit(q: int, kv: int, pinned: str) -> None:
    limit = Limit(candidate=pinned, num_qo_tokens=9000)
    dispatcher = Dispatcher(policy(table(limits=(limit,))), source="test", switches=Switches(pins=(pinned,)))
    found = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    assert found.rule is Rule.PIN
    assert (found.choose(q, kv, 1) == pinned) == (q <= 9000)
    assert found.explain(q, kv, 1).reason is (Reason.PIN if q <= 9000 else Reason.LIMIT)


def test_a_pin_of_a_modelled_table_ends_where_the_counts_that_it_claims_do() -> None:
    dispatcher = Dispatcher(modelled_policy(), source="test", switches=Switches(pins=("with_kvcache",)))
    found = dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")
    last = modelled_policy().tables[0].measured.num_qo_tokens[1]
    assert found.choose(last, 1 << 40, 1 << 20) == "with_kvcache"
    assert found.choose(last + 1, 1 << 40, 1 << 20) == "sparse_fwd"


def test_a_pin_leaves_other_sites_to_the_policy() -> None:
    dispatcher = Dispatcher(full_policy(), source="test", switches=Switches(pins=("with_kvcache",)))
    assert dispatcher.resolve("indexer_metadata", model="deepseek-v4-flash", layer="c4a").rule is Rule.POLICY


def test_a_pin_whose_limits_were_never_measured_is_refused() -> None:
    only = table(candidates=("sparse_fwd",), rows=table().rows[:0] or one_choice())
    dispatcher = Dispatcher(policy(only), source="test", switches=Switches(pins=("with_kvcache",)))
    with pytest.raises(PolicyError, match=r"whose limits were measured .* got with_kvcache; accepted: sparse_fwd"):
        dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a")


def one_choice() -> tuple[object, ...]:
    """Rows that answer ``sparse_fwd`` everywhere."""
    from mla_tune.policy.schema import Choice, Row

    return (Row(num_reqs_from=1, kv_tokens_from=0, choices=(Choice(candidate="sparse_fwd"),)),)


def test_the_environment_decides_nothing_after_load(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = Dispatcher.for_this_gpu()
    monkeypatch.setenv("MLA_TUNE_MODE", "off")
    assert dispatcher.resolve("prefill_attention", model="deepseek-v4-flash", layer="c4a").rule is Rule.POLICY


def test_what_decides_is_the_same_line_for_the_same_bytes_and_mode_only() -> None:
    def line(digest: str, *pins: str) -> str:
        return Dispatcher(full_policy(), source="any", digest=digest, switches=Switches(pins=pins)).decides_by

    assert line("ab") == line("ab")
    assert len({line("ab"), line("cd"), line("ab", "jit"), line("ab", "sparse_fwd")}) == 4
