"""Options that several commands have, and the checks of their values."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from mla_tune.errors import UsageError
from mla_tune.sites.provider import PROVIDERS
from mla_tune.sites.site import MODELS, OVERLAPS, ModelConfig, SiteName
from mla_tune.sites.site import model as find_model
from mla_tune.store.measurement import Regime

DEFAULT_TIMEOUT_S = 300.0
"""Longest that one point may take, compilation included. DeepGEMM compiles for 17 s; the slowest point takes three."""

GpuOption = Annotated[
    str, typer.Option("--gpu", help="auto, cpu, or the SKU of the GPU in this machine: h200, b200, ...")
]
ModelOption = Annotated[list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")]
SiteOption = Annotated[list[str] | None, typer.Option("--site", help="Only this site; may be repeated.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
TrafficOption = Annotated[
    Path | None, typer.Option("--traffic", help="Shapes that a server recorded (MLA_TUNE_RECORD): they weigh the fit.")
]
DbOption = Annotated[
    Path | None, typer.Option("--db", help="Working database (default db/<sku>.db of the user's folder).")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", help="Longest that one point may take, s; then its worker is replaced.")
]


StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit with an error where a table loses its own held-out points.")
]
OverlapOption = Annotated[
    int, typer.Option("--overlap", help="Percent of its selection that a query shares with the one before it.")
]


ProviderOption = Annotated[
    str, typer.Option("--provider", help="Whose kernels run around attention: own (the default) or sglang.")
]


def checked_provider(word: str) -> str:
    """``word``, if a sweep can be asked for it. Raises :class:`UsageError`."""
    if word not in PROVIDERS:
        raise UsageError(f"--provider must be a known one: got {word!r}; accepted: {', '.join(PROVIDERS)}")
    return word


def checked_overlap(overlap: int) -> int:
    """``overlap``, if inputs can be built with it. Raises :class:`UsageError`."""
    if overlap not in OVERLAPS:
        raise UsageError(f"--overlap must be a known model: got {overlap}; accepted: {', '.join(map(str, OVERLAPS))}")
    return overlap


def chosen_models(names: list[str] | None) -> list[ModelConfig]:
    """The models that ``--model`` names; all of them without it. Raises :class:`UsageError` for an unknown one."""
    return [find_model(name) for name in names] if names else list(MODELS.values())


def chosen_sites(names: list[str] | None) -> list[SiteName]:
    """The sites that ``--site`` names; all of them without it. Raises :class:`UsageError` for an unknown one."""
    known = [str(name) for name in SiteName]
    for name in names or ():
        if name not in known:
            raise UsageError(f"--site must be a known site: got {name!r}; accepted: {', '.join(known)}")
    return [SiteName(name) for name in names] if names else list(SiteName)


def chosen_regime(word: str | None) -> Regime | None:
    """The timing regime that ``--regime`` names. Raises :class:`UsageError`."""
    accepted = [str(regime) for regime in Regime]
    if word is not None and word not in accepted:
        raise UsageError(f"--regime must be a timing regime: got {word!r}; accepted: {', '.join(accepted)}")
    return Regime(word) if word else None


_BYTES = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def byte_count(option: str, text: str) -> int:
    """Bytes from ``536870912``, ``512MiB`` or ``1.5 GB``. Raises :class:`UsageError`."""
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,6})?)\s*([a-z]*)\s*", text.lower())
    unit = _BYTES.get(found[2]) if found else None
    count = int(Fraction(found[1]) * unit) if found and unit else 0
    if not 1 <= count < 1 << 63:
        accepted = "536870912, or with a unit of KiB, MiB, GiB, kB, MB, GB: 512MiB"
        raise UsageError(f"{option} must be a positive number of bytes: got {text!r}; accepted: {accepted}")
    return count


_COUNT = {"": 1, "k": 1 << 10, "m": 1 << 20}


def token_count(text: object) -> int:
    """A count of tokens or requests from ``131072``, ``131_072``, ``128K`` or ``1M`` (binary units, as contexts are named).

    Raises :class:`UsageError`.
    """
    found = re.fullmatch(r"(\d[\d_]{0,24})([km]?)", str(text).strip().lower())
    digits = found[1].replace("_", "") if found else ""
    count = int(digits) * _COUNT[found[2]] if found and len(digits) <= 18 else 1 << 63
    if count >= 1 << 63:
        raise UsageError(
            f"a count must be a whole number below 2^63: got {str(text)[:60]!r}; accepted: 131072, 128K or 1M"
        )
    return count


def parsed_count(text: object) -> int:
    """:func:`token_count` for an option's ``parser``: the refusal then names the option. Defaults come as integers."""
    try:
        return token_count(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def positive_seconds(option: str, value: float) -> float:
    """``value``, checked. Raises :class:`UsageError`."""
    if not 0 < value < float("inf"):
        raise UsageError(f"{option} must be a positive number of seconds: got {value}; accepted: for example 300")
    return value
