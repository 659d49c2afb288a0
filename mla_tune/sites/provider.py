"""Whose kernels run the stages around attention: this project's own, or an engine's, of one release.

Measurements of different providers have different sites (:attr:`mla_tune.sites.site.Site.provider`), so that the store, the
export and the fit keep them apart without a rule of their own. Standard library only.
"""

from __future__ import annotations

import msgspec

OWN = "own"
"""What ``--provider`` says for this project's kernels, which are the default; a site then has no provider."""
SGLANG = "sglang"
VLLM = "vllm"
PROVIDERS = (OWN, SGLANG)
"""What a sweep can be asked for."""
SGLANG_KERNEL = "sglang-kernel"
"""The distribution of SGLang's compiled kernels."""
_KERNELS = f"+{SGLANG_KERNEL}@"


class Provider(msgspec.Struct, frozen=True):
    """An engine whose kernels stand in for the project's own."""

    name: str
    version: str
    kernels: str = ""
    """Release of sglang-kernel, with which its top-k transform is timed as a stage of both paths; empty where it is not."""

    @property
    def transforms(self) -> bool:
        """Whether the top-k transform is a stage: paths with and without it are not compared."""
        return bool(self.kernels)

    @property
    def key(self) -> str:
        """Stable text form, ``sglang@0.5.23`` or ``sglang@0.5.23+sglang-kernel@0.4.10``; :meth:`parse` reads it back."""
        return f"{self.name}@{self.version}{_KERNELS}{self.kernels}" if self.kernels else f"{self.name}@{self.version}"

    @classmethod
    def parse(cls, key: str) -> Provider:
        """Read :attr:`key` back. Raises ``ValueError`` on anything that :attr:`key` cannot have written."""
        release, marker, kernels = key.partition(_KERNELS)
        name, at, version = release.partition("@")
        given = (version, kernels) if marker else (version,)
        printable = all(text and text.isprintable() and not set(text) & set(" /@") for text in given)
        if name not in PROVIDERS[1:] or not at or not printable:
            raise ValueError(f"not the key of a provider: {key!r}")
        return cls(name, version, kernels)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def is_provider_key(text: str) -> bool:
    """Whether :meth:`Provider.parse` reads it."""
    try:
        Provider.parse(text)
    except ValueError:
        return False
    return True
