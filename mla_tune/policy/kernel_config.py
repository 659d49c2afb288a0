"""The part of a policy that holds launch parameters of our own kernels; see :mod:`mla_tune.sites.launch_parameters`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from mla_tune.errors import UsageError

if TYPE_CHECKING:
    from mla_tune.sites.launch_parameters import KernelLaunch, Launches


class LaunchParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Parameters of one kernel by name, flags as 0 and 1; None for those that it does not have."""

    rows_per_program: int | None = None
    tokens_per_program: int | None = None
    columns_per_program: int | None = None
    column_programs: int | None = None
    entries_per_program: int | None = None
    tiles: int | None = None
    columns: int | None = None
    num_warps: int | None = None
    programs_per_sm: int | None = None
    stream_loads: int | None = None
    stream_stores: int | None = None

    def given(self) -> dict[str, int]:
        """Those that are there."""
        found = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return {name: value for name, value in found if value is not None}


class KernelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Tuned launch parameters of one kernel from one size up, until the kernel's next size class."""

    kernel: str
    size_from: int
    launch: LaunchParameters


def kernel_configs(launches: Iterable[KernelLaunch]) -> tuple[KernelConfig, ...]:
    """Launch parameters as a policy holds them, sorted by kernel and size."""
    from mla_tune.sites.launch_parameters import parameters

    return tuple(
        KernelConfig(
            kernel=entry.kernel, size_from=entry.size_from, launch=LaunchParameters(**parameters(entry.config))
        )
        for entry in sorted(launches, key=lambda entry: (entry.kernel, entry.size_from))
    )


def launches_of(configs: Iterable[KernelConfig]) -> Launches:
    """The lookup that they make; raises :class:`UsageError` for one that :func:`kernel_config_fault` refuses."""
    from mla_tune.sites.launch_parameters import (  # a server that launches none of these kernels never needs it
        Launches,
        make_launch,
    )

    return Launches(tuple(make_launch(entry.kernel, entry.size_from, entry.launch.given()) for entry in configs))


def kernel_config_fault(entry: KernelConfig) -> str | None:
    """Why an entry cannot stand in a policy, with what is accepted; None if it can."""
    try:
        launches_of((entry,))
    except UsageError as error:
        return str(error)
    return None
