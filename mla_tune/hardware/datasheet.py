"""What the vendor states of each GPU product: the figures that a measurement is scaled by to reach another product.

Every figure has its source beside it. ``derived`` marks one that no document states, with the arithmetic; ``reported``
one that the driver or CUDA reports on the part, rather than a datasheet. Figures are for the SXM, HGX or NVL72 form, and
dense: a datasheet's tensor figures with sparsity are halved. Standard library only.

Other products share a chip with these and have no datasheet here, since they have no modelled policy either:

* H100 PCIe (114 SMs, 2.0 TB/s, 350 W), H100 NVL (132 SMs, 3.9 TB/s, 400 W) and H200 NVL (132 SMs, 1785 MHz, 600 W) run
  below the clocks of their datasheets by a margin that depends on the power limit, which no model here covers.
* H20-3e (78 SMs, 141 GB at 4.8 TB/s) and GH200 (an H100 with 96 GB at 4.0 or 144 GB at 4.9 TB/s) would model as an H20
  and an H100 with that bandwidth, but nobody has timed either to check the model against.

Sweep such a product instead: it has a policy under its own name.
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_tune.errors import UsageError

_GB, _MB = 10**9, 10**6
SM90 = "sm90"
SM100 = "sm100"
"""B200 and GB200 are compute capability 10.0, B300 and GB300 10.3: one family, which shares its kernels."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number and where it is from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Datasheet:
    """The figures of one product."""

    sku: str
    architecture: str
    """Kernels are built for it: :data:`SM90` or :data:`SM100`."""
    sm_count: Figure
    boost_clock_mhz: Figure
    memory_bandwidth_gbps: Figure
    """10^9 bytes per second."""
    bf16_tflops: Figure
    """Dense, float32 accumulation."""
    fp8_tflops: Figure
    """Dense. No stage computes in fp8 today: stated for kernels to come."""
    l2_bytes: Figure
    hbm_bytes: Figure
    shared_memory_optin_bytes: Figure
    """Dynamic shared memory that one block may opt in to."""

    @property
    def bf16_tflops_per_sm(self) -> float:
        """Tensor throughput of one SM."""
        return self.bf16_tflops.value / self.sm_count.value


_H100 = "NVIDIA H100 Tensor Core GPU datasheet, column H100 SXM"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet, column H200 SXM"
_H20 = "NVIDIA H20 product brief, as the press reprinted it (no public datasheet)"
_HGX = "NVIDIA HGX platform datasheet (8 GPUs)"
_GB200 = "NVIDIA GB200 NVL72 datasheet (72 GPUs)"
_GB300 = "NVIDIA GB300 NVL72 datasheet (72 GPUs)"
_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture whitepaper"
_OPTIN = Figure(232448, "CUDA C++ Programming Guide, compute capabilities 9.0 and 10.x: 227 KiB; 227 * 1024")
_H100_L2 = Figure(50 * _MB, f"{_HOPPER}: 50 MB")
_BLACKWELL_L2 = Figure(
    126.5 * _MB, "reported by CUDA on a B200 as 126.5 MB; B300, GB200 and GB300 taken to have the same"
)
_BLACKWELL_SMS = "reported by CUDA (of 160 on the two full dies); B200: 74 on each die"
_HOPPER_CLOCK = Figure(1980, "reported by nvidia-smi as the highest SM clock; 67 TFLOP/s fp32 / (132 SMs * 256) = 1983")
_B200_CLOCK = Figure(1979, f"derived: {_HGX}, fp32 600 / 8 = 75 TFLOP/s / (148 SMs * 128 cores * 2)")
_B300_CLOCK = Figure(1920, "reported by nvidia-smi as the highest SM clock")
_NVL72_CLOCK = Figure(2056, "derived: GB200 NVL72 datasheet, fp32 5760 / 72 = 80 TFLOP/s / (152 SMs * 128 cores * 2)")

DATASHEETS: tuple[Datasheet, ...] = (
    Datasheet(
        sku="nvidia-h20",
        architecture=SM90,
        sm_count=Figure(78, "reported by CUDA"),
        boost_clock_mhz=Figure(1980, "reported by nvidia-smi as the highest SM clock"),
        memory_bandwidth_gbps=Figure(4000, f"{_H20}: 4.0 TB/s"),
        bf16_tflops=Figure(148, f"{_H20}: 148 TFLOP/s"),
        fp8_tflops=Figure(296, f"{_H20}: 296 TFLOP/s"),
        l2_bytes=Figure(60 * _MB, f"{_H20}: 60 MB"),
        hbm_bytes=Figure(96 * _GB, f"{_H20}: 96 GB"),
        shared_memory_optin_bytes=_OPTIN,
    ),
    Datasheet(
        sku="nvidia-h100",
        architecture=SM90,
        sm_count=Figure(132, f"{_HOPPER}: H100 SXM5"),
        boost_clock_mhz=_HOPPER_CLOCK,
        memory_bandwidth_gbps=Figure(3350, f"{_H100}: 3.35 TB/s"),
        bf16_tflops=Figure(989.5, f"{_H100}: 1,979 TFLOP/s with sparsity / 2"),
        fp8_tflops=Figure(1979, f"{_H100}: 3,958 TFLOP/s with sparsity / 2"),
        l2_bytes=_H100_L2,
        hbm_bytes=Figure(80 * _GB, f"{_H100}: 80 GB"),
        shared_memory_optin_bytes=_OPTIN,
    ),
    Datasheet(
        sku="nvidia-h200",
        architecture=SM90,
        sm_count=Figure(132, "reported by CUDA (measured here)"),
        boost_clock_mhz=_HOPPER_CLOCK,
        memory_bandwidth_gbps=Figure(4800, f"{_H200}: 4.8 TB/s"),
        bf16_tflops=Figure(989.5, f"{_H200}: 1,979 TFLOP/s with sparsity / 2"),
        fp8_tflops=Figure(1979, f"{_H200}: 3,958 TFLOP/s with sparsity / 2"),
        l2_bytes=Figure(60 * _MB, "reported by CUDA (measured here): 60 MB"),
        hbm_bytes=Figure(141 * _GB, f"{_H200}: 141 GB"),
        shared_memory_optin_bytes=_OPTIN,
    ),
    Datasheet(
        sku="nvidia-h800",
        architecture=SM90,
        sm_count=Figure(132, "as H100 SXM: H800 differs from it in NVLink and fp64 alone"),
        boost_clock_mhz=_HOPPER_CLOCK,
        memory_bandwidth_gbps=Figure(3350, f"as {_H100}"),
        bf16_tflops=Figure(989.5, f"as {_H100}"),
        fp8_tflops=Figure(1979, f"as {_H100}"),
        l2_bytes=_H100_L2,
        hbm_bytes=Figure(80 * _GB, f"as {_H100}"),
        shared_memory_optin_bytes=_OPTIN,
    ),
    Datasheet(
        sku="nvidia-b200",
        architecture=SM100,
        sm_count=Figure(148, _BLACKWELL_SMS),
        boost_clock_mhz=_B200_CLOCK,
        memory_bandwidth_gbps=Figure(
            7672,
            "reported by CUDA as a 7680-bit bus at 3996 MHz: 7680 / 8 * 2 * 3996; the platform datasheet rounds to 8 TB/s",
        ),
        bf16_tflops=Figure(2250, f"derived: {_HGX}, 36 PFLOP/s with sparsity / 8 / 2"),
        fp8_tflops=Figure(4500, f"derived: {_HGX}, 72 PFLOP/s with sparsity / 8 / 2"),
        l2_bytes=_BLACKWELL_L2,
        hbm_bytes=Figure(180 * _GB, "derived: NVIDIA DGX B200 datasheet, 1,440 GB / 8"),
        shared_memory_optin_bytes=_OPTIN,
    ),
    Datasheet(
        sku="nvidia-b300",
        architecture=SM100,
        sm_count=Figure(148, _BLACKWELL_SMS),
        boost_clock_mhz=_B300_CLOCK,
        memory_bandwidth_gbps=Figure(8000, f"derived: {_HGX}, 64 TB/s / 8"),
        bf16_tflops=Figure(2250, f"derived: {_HGX}, 36 PFLOP/s with sparsity / 8 / 2"),
        fp8_tflops=Figure(4500, f"derived: {_HGX}, 72 PFLOP/s with sparsity / 8 / 2"),
        l2_bytes=_BLACKWELL_L2,
        hbm_bytes=Figure(288 * _GB, "NVIDIA Blackwell Ultra technical blog: 288 GB"),
        shared_memory_optin_bytes=_OPTIN,
    ),
    Datasheet(
        sku="nvidia-gb200",
        architecture=SM100,
        sm_count=Figure(152, _BLACKWELL_SMS),
        boost_clock_mhz=_NVL72_CLOCK,
        memory_bandwidth_gbps=Figure(8000, f"derived: {_GB200}, 576 TB/s / 72"),
        bf16_tflops=Figure(2500, f"derived: {_GB200}, 360 PFLOP/s with sparsity / 72 / 2"),
        fp8_tflops=Figure(5000, f"derived: {_GB200}, 720 PFLOP/s with sparsity / 72 / 2"),
        l2_bytes=_BLACKWELL_L2,
        hbm_bytes=Figure(186 * _GB, f"derived: {_GB200}, 13.4 TB / 72"),
        shared_memory_optin_bytes=_OPTIN,
    ),
    Datasheet(
        sku="nvidia-gb300",
        architecture=SM100,
        sm_count=Figure(152, _BLACKWELL_SMS),
        boost_clock_mhz=_NVL72_CLOCK,
        memory_bandwidth_gbps=Figure(8000, f"derived: {_GB300}, 576 TB/s / 72"),
        bf16_tflops=Figure(2500, f"derived: {_GB300}, 360 PFLOP/s with sparsity / 72 / 2"),
        fp8_tflops=Figure(5000, f"derived: {_GB300}, 720 PFLOP/s with sparsity / 72 / 2"),
        l2_bytes=_BLACKWELL_L2,
        hbm_bytes=Figure(279 * _GB, f"derived: {_GB300}, 20.1 TB / 72"),
        shared_memory_optin_bytes=_OPTIN,
    ),
)

_FAMILIES = {SM90: ("h100", "h200", "h800", "h20", "gh200"), SM100: ("b200", "b300", "gb200", "gb300")}
"""First words of the products of an architecture, other forms of the chip included: ``nvidia-h100-pcie``."""


def architecture(sku: str) -> str | None:
    """:data:`SM90` or :data:`SM100`, by the product's name; None for any other GPU, and for the CPU."""
    word = sku.removeprefix("nvidia-").split("-")[0]
    return next((name for name, words in _FAMILIES.items() if word in words), None)


def datasheet(sku: str) -> Datasheet:
    """The figures of ``sku``, a canonical name. Raises :class:`UsageError` that lists the products that have some."""
    for found in DATASHEETS:
        if found.sku == sku:
            return found
    accepted = ", ".join(found.sku for found in DATASHEETS)
    raise UsageError(f"a scaled GPU must have a datasheet in mla-tune: got {sku!r}; accepted: {accepted}")


def same_figures(sku: str) -> tuple[Datasheet, ...]:
    """Products whose every scaled figure is that of ``sku``, itself first: a model says the same of them."""
    first = datasheet(sku)
    others = (other for other in DATASHEETS if other.sku != sku and _scaled(other) == _scaled(first))
    return (first, *others)


def _scaled(sheet: Datasheet) -> tuple[object, ...]:
    """Everything that a model is made of."""
    figures = (sheet.sm_count, sheet.boost_clock_mhz, sheet.memory_bandwidth_gbps, sheet.bf16_tflops, sheet.l2_bytes)
    return (sheet.architecture, sheet.shared_memory_optin_bytes.value, *(figure.value for figure in figures))
