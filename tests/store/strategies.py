"""Measurements for the tests of the store: a few fixed ones, and hypothesis strategies over all outcomes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from mla_tune.hardware.sku import Environment, KernelLibrary
from mla_tune.sites.launch_parameters import KERNELS, CombineConfig, DequantizeConfig, KernelLaunch
from mla_tune.sites.provider import Provider
from mla_tune.sites.shape import Shape
from mla_tune.sites.site import LayerType, Site, SiteName
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import PER_LAYER_TOTAL, Measurement, Outcome, Quarantined, Regime, Role, Stop
from mla_tune.store.tuned import Tuned

ENVIRONMENT = Environment(
    sku="nvidia-h200",
    sm_count=132,
    shared_memory_optin_bytes=232448,
    driver="580.95.05",
    cuda="13.0",
    torch="2.11.0+cu130",
    triton="3.6.0",
    libraries=(
        KernelLibrary("sgl-deep-gemm", "0.1.2", "1f" * 32),
        KernelLibrary("sgl-flash-mla", "1.0.0", "2e" * 32),
    ),
)
NVL_ENVIRONMENT = replace(
    ENVIRONMENT, sku="nvidia-h200-nvl", product="NVIDIA H200 NVL", memory_gib=140, power_limit_w=600
)
CPU_ENVIRONMENT = Environment("cpu", 2, 0, "Some Processor", "", "2.13.0", "", ())

C4A = Site(SiteName.PREFILL_ATTENTION, LayerType.C4A, 64, 512)
METADATA = Site(SiteName.INDEXER_METADATA, LayerType.C4A)
SHAPE = Shape(16, 8192, 131072)
SITES = (
    *(C4A, replace(C4A, overlap=80), replace(C4A, provider=Provider("sglang", "0.5.23", "0.4.10"))),
    *(Site(SiteName.PREFILL_ATTENTION, LayerType.SWA_ONLY, 64), METADATA),
)


def timing(latency_us: float = 812.3456, *, shape: Shape = SHAPE, part: str = "attention") -> Measurement:
    """An ``ok`` measurement of ``sparse_fwd``; vary it with ``dataclasses.replace``."""
    return Measurement(
        site=C4A,
        shape=shape,
        role=Role.FIT,
        candidate="sparse_fwd",
        part=part,
        regime=Regime.GRAPH,
        outcome=Outcome.OK,
        latency_us=latency_us,
        ci_low_us=latency_us * 0.99,
        ci_high_us=latency_us * 1.01,
        num_samples=3,
        samples_us=(latency_us * 0.99, latency_us, latency_us * 1.01),
        first_call_s=1.2345678,
        workspace_bytes=3 << 30,
    )


def failure(outcome: Outcome = Outcome.UNSUPPORTED, detail: str = "package flash_mla is not installed") -> Measurement:
    """A failed measurement of ``with_kvcache``."""
    return Measurement(C4A, SHAPE, Role.FIT, "with_kvcache", PER_LAYER_TOTAL, Regime.GRAPH, outcome, detail)


def fixed_rows() -> list[Measurement]:
    """What ``data/schema_m001.db`` holds of :data:`ENVIRONMENT`."""
    held_out = Shape(1, 300, 5000)
    return [
        timing(),
        timing(30.0, part="dequantize"),
        failure(),
        replace(timing(91.5, shape=held_out), role=Role.HELD_OUT, regime=Regime.EAGER),
        replace(failure(Outcome.WRONG_RESULT, "rows 12-31 were never written"), shape=held_out, role=Role.HELD_OUT),
    ]


def export_order(measurements: list[Measurement]) -> list[Measurement]:
    """The stable order of databases and exports."""
    return sorted(measurements, key=lambda m: m.key)


names = st.sampled_from(["sparse_fwd", "with_kvcache", "jit"])
parts = st.sampled_from(["attention", "combine", "per_layer", "per_forward"])
details = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
latencies_us = st.floats(min_value=0, max_value=1e9)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Shapes from a small space, so that points meet, up to large ones."""
    num_reqs = draw(st.integers(1, 3))
    num_qo_tokens = draw(st.integers(num_reqs, num_reqs + 2) | st.integers(num_reqs, 1 << 17))
    return Shape(num_reqs, num_qo_tokens, draw(st.integers(num_qo_tokens, 1 << 31)))


@st.composite
def _at(draw: st.DrawFn, site: Site, shape: Shape, role: Role) -> Measurement:
    """One sound measurement at a point, of any outcome."""
    outcome = draw(st.sampled_from(Outcome))
    measurement = Measurement(
        site=site,
        shape=shape,
        role=role,
        candidate=draw(names),
        part=draw(parts),
        regime=draw(st.sampled_from(Regime)),
        outcome=outcome,
        first_call_s=draw(st.none() | st.floats(0, 100)),
        workspace_bytes=draw(st.none() | st.integers(0, 2**40)),
    )
    if outcome is not Outcome.OK:
        return replace(measurement, detail=draw(details))
    measurement = replace(
        measurement,
        stopped_by=draw(st.none() | st.sampled_from(Stop)),
        power_capped=draw(st.booleans()),
        launches=draw(st.sampled_from(["", "0123456789ab"])),
    )
    low, middle, high = sorted(draw(st.tuples(latencies_us, latencies_us, latencies_us)))
    if draw(st.booleans()):
        measurement = replace(measurement, ci_low_us=low, ci_high_us=high)
    samples = draw(st.lists(latencies_us, max_size=3))
    return replace(measurement, latency_us=middle, num_samples=draw(st.integers(0, 1000)), samples_us=tuple(samples))


@st.composite
def measurement_lists(draw: st.DrawFn) -> list[Measurement]:
    """Sound measurements of one environment: keys differ, and every point has one role."""
    points = draw(st.lists(st.tuples(st.sampled_from(SITES), shapes()), max_size=4, unique=True))
    measurements: list[Measurement] = []
    for site, shape in points:
        role = draw(st.sampled_from(Role))
        measurements += draw(st.lists(_at(site, shape, role), max_size=5, unique_by=lambda m: m.key))
    return measurements


lines = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=30)
"""One printable line."""
quarantines = st.builds(Quarantined, lines, st.lists(latencies_us, min_size=1, max_size=3).map(tuple))


def disturbed(reason: str = "throttled: power cap", *samples_us: float) -> Measurement:
    """A measurement without an undisturbed sample."""
    return replace(
        failure(Outcome.DISTURBED, f"no undisturbed samples: {reason}"),
        quarantined=(Quarantined(reason, samples_us or (5.0, 7.0)),),
    )


@st.composite
def _tries(draw: st.DrawFn) -> Try:
    outcome = draw(st.sampled_from(Outcome))
    return Try(
        site=draw(st.sampled_from(SITES)),
        candidate=draw(names),
        shape=draw(shapes()),
        outcome=outcome,
        detail="" if outcome is Outcome.OK else draw(lines),
        first_call_s=draw(st.none() | st.floats(0, 100)),
    )


try_lists = st.lists(_tries(), max_size=5, unique_by=lambda attempt: attempt.key)


def fixed_tries() -> list[Try]:
    """What ``data/schema_m002.db`` holds of :data:`ENVIRONMENT` besides :func:`fixed_rows`."""
    return [
        Try(METADATA, "deep_gemm", Shape(1, 14368, 14368), Outcome.OK, "", 12.5),
        Try(METADATA, "deep_gemm", Shape(1, 14369, 14369), Outcome.RUNTIME_ERROR, "RuntimeError: invalid argument"),
    ]


@st.composite
def tuned_lists(draw: st.DrawFn) -> list[Tuned]:
    """Tuned launch parameters of one environment."""
    kernels = draw(st.lists(st.sampled_from(sorted(KERNELS)), max_size=4, unique=True))
    found = []
    for kernel in kernels:
        entry = draw(st.sampled_from(KERNELS[kernel].classes))
        launch = KernelLaunch(kernel, entry.size_from, entry.default)
        us = st.floats(0.001, 1e6)
        found.append(Tuned(launch, draw(us), draw(us), draw(st.integers(1, 500))))
    return found


def fixed_tuned() -> list[Tuned]:
    """What ``data/schema_m003.db`` holds of :data:`ENVIRONMENT` besides :func:`fixed_tries`."""
    return [
        Tuned(KernelLaunch("combine_topk", 0, CombineConfig(1, 1024, 4)), 3.25, 4.5, 17),
        Tuned(KernelLaunch("dequantize_v4", 131072, DequantizeConfig(8, 1, 32, True, False)), 801.5, 850.25, 60),
    ]


environments = st.builds(
    Environment,
    sku=st.sampled_from(["nvidia-h200", "nvidia-b200", "cpu"]),
    sm_count=st.integers(0, 200),
    shared_memory_optin_bytes=st.integers(0, 1 << 20),
    driver=details,
    cuda=st.just("13.0"),
    torch=st.just("2.11.0"),
    triton=st.just("3.6.0"),
    libraries=st.lists(st.builds(KernelLibrary, details, details, details), max_size=2).map(tuple),
    product=st.sampled_from(["", "NVIDIA H200", "NVIDIA H200 NVL"]),
    memory_gib=st.sampled_from([0, 70, 140]),
    power_limit_w=st.sampled_from([0, 600, 700]),
)
