"""Where the policies that ship with mla-tune are: one ``<sku>.yaml`` for each GPU product.

Beside it there may be a ``<sku>.<provider>.yaml``, measured with an engine's kernels around attention in the place of ours.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from mla_tune.errors import PolicyError
from mla_tune.sites.provider import OWN

_SAME_POLICY = {"nvidia-h800": "nvidia-h100", "nvidia-b300": "nvidia-b200", "nvidia-gb300": "nvidia-gb200"}
"""Products without a file of their own, and the one whose modelled policy names them: their datasheets agree in all that it
is made of. A test holds both to it."""


def packaged_policies() -> dict[str, Traversable]:
    """Every shipped policy file by its name without ``.yaml``, sorted.

    They are the wheel's ``mla_tune/policies``, or a checkout's ``policies``.
    """
    return {entry.name.removesuffix(".yaml"): entry for entry in _policy_files()}


def packaged_policy(sku: str, provider: str = OWN) -> Traversable:
    """The shipped policy file of ``sku``: the one with the kernels of ``provider`` if there is one, else the one with ours.

    Raises :class:`PolicyError` that lists the SKUs there are.
    """
    found = packaged_policies()
    if sku not in found:
        sku = _SAME_POLICY.get(sku, sku)
    theirs = found.get(f"{sku}.{provider}")
    if theirs is not None:
        return theirs
    if sku not in found:
        accepted = ", ".join(name for name in found if "." not in name) or "none"
        raise PolicyError(
            f"a policy must ship for this GPU: got none for {sku}; accepted: {accepted}; "
            "run `mla-tune sweep` and `mla-tune fit` on it, or set MLA_TUNE_POLICY to a policy file"
        )
    return found[sku]


def _policy_files() -> list[Traversable]:
    package = files("mla_tune")
    inside = _yaml_files(package.joinpath("policies"))
    if inside or not isinstance(package, Path):
        return inside
    checkout = package.parent
    # Beside an installed package lies whatever else is installed: only a checkout has this file there.
    return _yaml_files(checkout / "policies") if (checkout / "pyproject.toml").is_file() else []


def _yaml_files(folder: Traversable) -> list[Traversable]:
    if not folder.is_dir():
        return []
    found = (entry for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return sorted(found, key=lambda entry: entry.name.removesuffix(".yaml"))
