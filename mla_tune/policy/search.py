"""Where policy files are, in the order in which they are looked for: one that is named, the user's, those that ship.

``<sku>.<provider>.yaml`` was measured with an engine's kernels around attention, ``<sku>.yaml`` with this project's; an
engine takes its own before the other. Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from mla_tune.errors import PolicyError
from mla_tune.sites.provider import OWN

HOME_VARIABLE = "MLA_TUNE_HOME"
"""The folder of what this user's sweeps and fits leave; by default ``mla-tune`` in XDG_DATA_HOME."""


_SAME_POLICY = {"nvidia-gb300": "nvidia-gb200"}
"""Products without a shipped file of their own, and the one whose modelled policy names them: their datasheets agree in all
that it is made of. A test holds both to it."""


class Place(StrEnum):
    """Who put a policy file where it was found."""

    NAMED = "named"
    USER = "user"
    SHIPPED = "shipped"


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """One file that may serve."""

    place: Place
    path: Traversable

    def __str__(self) -> str:
        return str(self.path)


def user_home(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of this user's policies and measurements; it need not be there."""
    named = environment.get(HOME_VARIABLE, "").strip()
    if named:
        return Path(named).expanduser()
    data = environment.get("XDG_DATA_HOME", "").strip()
    # As the XDG specification has it, a relative path counts as unset.
    base = Path(data) if os.path.isabs(data) else Path(os.path.expanduser("~")) / ".local" / "share"
    return base / "mla-tune"


def user_policies(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of this user's policies."""
    return user_home(environment) / "policies"


def policy_name(sku: str, provider: str = OWN) -> str:
    """The file name of a policy: of an engine's kernels, or of this project's."""
    return f"{sku}.yaml" if provider == OWN else f"{sku}.{provider.partition('@')[0]}.yaml"


def policy_files(
    sku: str, provider: str = OWN, named: str | None = None, environment: Mapping[str, str] = os.environ
) -> Iterator[PolicyFile]:
    """The files to look into for ``sku`` and an engine with the kernels of ``provider``, the first of them first.

    A named file is the only one, there or not; of the others those that are there.
    """
    if named is not None:
        yield PolicyFile(Place.NAMED, Path(named))
        return
    names = dict.fromkeys((policy_name(sku, provider), policy_name(sku)))
    same = _SAME_POLICY.get(sku, sku)
    folder, shipped = user_policies(environment), packaged_policies()
    for name in names:
        if (path := folder / name).is_file():
            yield PolicyFile(Place.USER, path)
    for name in dict.fromkeys((*names, policy_name(same, provider), policy_name(same))):
        if (file := shipped.get(name.removesuffix(".yaml"))) is not None:
            yield PolicyFile(Place.SHIPPED, file)


def policy_file(sku: str, provider: str = OWN) -> PolicyFile:
    """The first of :func:`policy_files`, whether its tables serve here or not; ``sku`` need not be in this machine.

    Raises :class:`PolicyError` that lists the SKUs there are.
    """
    found = next(policy_files(sku, provider), None)
    if found is None:
        accepted = ", ".join(name for name in packaged_policies() if "." not in name) or "none"
        raise PolicyError(
            f"a policy must be there for this GPU: got none for {sku}; accepted: {accepted}; "
            "run `mla-tune sweep` and `mla-tune fit` on it, or set MLA_TUNE_POLICY to a policy file"
        )
    return found


def packaged_policies() -> dict[str, Traversable]:
    """Every shipped policy file by its name without ``.yaml``, sorted.

    They are the wheel's ``mla_tune/policies``, or a checkout's ``policies``.
    """
    return {entry.name.removesuffix(".yaml"): entry for entry in _shipped_files()}


def checkout() -> Path | None:
    """The checkout that this package is run from; None for an installed one."""
    package = files("mla_tune")
    # Beside an installed package lies whatever else is installed: only a checkout has this file there.
    inside = isinstance(package, Path) and (package.parent / "pyproject.toml").is_file()
    return package.parent if isinstance(package, Path) and inside else None


def _shipped_files() -> list[Traversable]:
    inside = _yaml_files(files("mla_tune").joinpath("policies"))
    source = checkout()
    return inside or ([] if source is None else _yaml_files(source / "policies"))


def _yaml_files(folder: Traversable) -> list[Traversable]:
    if not folder.is_dir():
        return []
    found = (entry for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(found, key=lambda entry: entry.name.removesuffix(".yaml"))
