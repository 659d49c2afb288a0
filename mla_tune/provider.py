"""Whose kernels run the stages around attention: this project's own, or an engine's, of one release.

Measurements of different providers have different sites (:attr:`mla_tune.site.Site.provider`), so that the store, the
export and the fit keep them apart without a rule of their own. Standard library only.
"""

from __future__ import annotations

import msgspec

OWN = "own"
"""What ``--provider`` says for this project's kernels, which are the default; a site then has no provider."""
SGLANG = "sglang"
PROVIDERS = (OWN, SGLANG)
"""What a sweep can be asked for."""
_TRANSFORMS = "+topk_transform"


class Provider(msgspec.Struct, frozen=True):
    """An engine whose kernels stand in for the project's own."""

    name: str
    version: str
    transforms: bool = False
    """Whether its top-k transform is timed as a stage of both paths: paths with and without it are not compared."""

    @property
    def key(self) -> str:
        """Stable text form, ``sglang@0.5.23`` or ``sglang@0.5.23+topk_transform``; :meth:`parse` reads it back."""
        return f"{self.name}@{self.version}{_TRANSFORMS if self.transforms else ''}"

    @classmethod
    def parse(cls, key: str) -> Provider:
        """Read :attr:`key` back. Raises ``ValueError`` on anything that :attr:`key` cannot have written."""
        release = key.removesuffix(_TRANSFORMS)
        name, at, version = release.partition("@")
        printable = version.isprintable() and not set(version) & set(" /@")
        if name not in PROVIDERS[1:] or not at or not version or not printable:
            raise ValueError(f"not the key of a provider: {key!r}")
        return cls(name, version, release != key)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def is_provider_key(text: str) -> bool:
    """Whether :meth:`Provider.parse` reads it."""
    try:
        Provider.parse(text)
    except ValueError:
        return False
    return True
