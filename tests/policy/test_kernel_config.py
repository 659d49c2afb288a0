"""Launch parameters on their way from a tuner through a policy to whoever launches a kernel."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_tune.errors import PolicyError, UsageError
from mla_tune.policy.codec import dump_policy, load_policy, parse_policy
from mla_tune.policy.kernel_config import KernelConfig, LaunchParameters, kernel_configs
from mla_tune.policy.schema import Policy
from mla_tune.runtime import Dispatcher
from mla_tune.sites.launch_parameters import (
    DEFAULT_LAUNCHES,
    KERNELS,
    CombineConfig,
    DequantizeConfig,
    KernelLaunch,
    Launches,
    make_launch,
    parameters,
)

GOLDEN = Path(__file__).parent / "golden.yaml"
TUNED = (
    KernelLaunch("dequantize_v4", 131072, DequantizeConfig(8, 1, 16, True, False)),
    KernelLaunch("combine_topk", 0, CombineConfig(1, 1024, 4)),
)


def with_launches(*entries: KernelLaunch) -> Policy:
    return msgspec.structs.replace(load_policy(GOLDEN), kernel_config=kernel_configs(entries))


def test_a_policy_without_launch_parameters_has_no_line_for_them() -> None:
    assert b"kernel_config" not in dump_policy(load_policy(GOLDEN))
    assert Dispatcher.load(GOLDEN).launches == DEFAULT_LAUNCHES


def test_what_was_tuned_is_what_a_server_launches_with_and_the_rest_is_the_default(tmp_path: Path) -> None:
    data = dump_policy(with_launches(*TUNED))
    assert (
        b"    - {size_from: 131072, rows_per_program: 8, num_warps: 1, programs_per_sm: 16, "
        b"stream_loads: 1, stream_stores: 0}\n"
    ) in data
    (tmp_path / "p.yaml").write_bytes(data)
    launches = Dispatcher.load(tmp_path / "p.yaml").launches
    assert launches.dequantize("v4", 131072) == launches.dequantize("v4", 1 << 30) == TUNED[0].config
    assert launches.dequantize("v4", 131071) == DEFAULT_LAUNCHES.dequantize("v4", 131071)
    assert launches.dequantize("dsa", 1 << 20) == DEFAULT_LAUNCHES.dequantize("dsa", 1 << 20)
    assert launches.combine(True, 1) == TUNED[1].config
    assert launches.combine(False, 1) == DEFAULT_LAUNCHES.combine(False, 1)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (KernelConfig(kernel="other", size_from=0, launch=LaunchParameters()), "accepted: dequantize_v4"),
        (KernelConfig(kernel="slot_ids", size_from=7, launch=LaunchParameters()), "got 7; accepted: 0, 131072"),
        (KernelConfig(kernel="slot_ids", size_from=0, launch=LaunchParameters(tiles=2)), "parameters of slot_ids"),
        (
            KernelConfig(kernel="slot_ids", size_from=0, launch=LaunchParameters(rows_per_program=3, num_warps=1)),
            "power of two",
        ),
    ],
)
def test_launch_parameters_that_no_kernel_takes_are_refused_with_their_place(entry: KernelConfig, said: str) -> None:
    broken = msgspec.structs.replace(load_policy(GOLDEN), kernel_config=(entry,))
    with pytest.raises(PolicyError, match=r"kernel_config\[0\]") as error:
        dump_policy(broken)
    assert said in str(error.value)


def test_one_size_class_has_one_entry() -> None:
    with pytest.raises(PolicyError, match="must not repeat"):
        dump_policy(with_launches(TUNED[0], TUNED[0]))


@given(st.sampled_from(sorted(KERNELS)), st.integers(0, 1 << 40))
@settings(max_examples=50)
def test_every_size_has_parameters_and_they_survive_being_stored(kernel: str, size: int) -> None:
    config = DEFAULT_LAUNCHES.config(kernel, size)
    size_from = KERNELS[kernel].class_of(size).size_from
    assert make_launch(kernel, size_from, parameters(config)) == KernelLaunch(kernel, size_from, config)
    policy = with_launches(KernelLaunch(kernel, size_from, config))
    assert parse_policy(dump_policy(policy), "again") == policy


def test_a_digest_tells_launch_parameters_apart_and_is_empty_for_the_defaults() -> None:
    default = KernelLaunch("slot_ids", 0, DEFAULT_LAUNCHES.slot_ids(0))
    assert Launches((default,)).digest(["slot_ids"]) == ""
    assert Launches(TUNED).digest(["slot_ids"]) == ""
    assert len({Launches(TUNED).digest(["dequantize_v4"]), Launches(TUNED).digest(["combine_topk"])}) == 2
    assert Launches(TUNED).digest(KERNELS) == Launches(TUNED[::-1]).digest(KERNELS) != ""


def test_a_flag_is_a_flag() -> None:
    with pytest.raises(UsageError, match="stream_loads must be a flag: got 2"):
        make_launch("dequantize_v4", 0, parameters(DequantizeConfig()) | {"stream_loads": 2})
