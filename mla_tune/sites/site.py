"""Where an engine chooses, and the models it chooses for.

A *site* is a place in a serving engine where two or more kernels compute the same thing, together with everything that
is fixed once the model is loaded. What changes from forward to forward is a :class:`mla_tune.sites.shape.Shape`.

Model figures (layers, heads, top-k, context) are from the public ``config.json`` of each model. Standard library only:
a serving process imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from mla_tune.errors import UsageError
from mla_tune.sites.provider import Provider

SWA_WINDOW = 128
"""Tokens of the sliding window that every V4 layer attends to beside its selection."""

FORWARD = "forward"
"""Pseudo-layer of a table that makes one choice for a whole forward, weighted by the model's layer counts."""


class SiteName(StrEnum):
    """The two places where an engine chooses today."""

    PREFILL_ATTENTION = "prefill_attention"
    INDEXER_METADATA = "indexer_metadata"


class LayerType(StrEnum):
    """How a layer compresses its context before sparse attention."""

    SWA_ONLY = "swa_only"
    C4A = "c4a"
    C128A = "c128a"
    DSA = "dsa"

    @property
    def compress_ratio(self) -> int:
        """Context tokens per compressed cache row; 0 for ``swa_only``, which has no compressed rows."""
        return _COMPRESS_RATIO[self]

    @property
    def has_window(self) -> bool:
        """Whether queries also attend to the last :data:`SWA_WINDOW` tokens from a cache of their own (V4 layers)."""
        return self is not LayerType.DSA

    @property
    def page_size(self) -> int:
        """Rows per page of the compressed cache (``swa_only``: of the window cache), as SGLang 0.5.23 lays it out."""
        return _PAGE_SIZE[self]


_COMPRESS_RATIO = {LayerType.SWA_ONLY: 0, LayerType.C4A: 4, LayerType.C128A: 128, LayerType.DSA: 1}
_PAGE_SIZE = {LayerType.SWA_ONLY: 256, LayerType.C4A: 64, LayerType.C128A: 2, LayerType.DSA: 64}

SWA_PAGE_SIZE = 256
"""Tokens per page of the V4 sliding-window cache (the engine's page size; the window itself is 128)."""

OVERLAPS = (0, 50, 80, 95)
"""Percent of its selection that a query shares with the query before it, as inputs are built: 0 is independent."""


@dataclass(frozen=True, slots=True)
class Site:
    """A choice and all that is fixed when the model is loaded. Models whose layers agree on it share measurements."""

    name: SiteName
    layer: LayerType
    h_q: int | None = None
    """Query heads per rank as the kernel sees them (64 or 128); None where heads play no role."""
    topk: int | None = None
    """Selected entries per query without the window; None where the layer selects everything or nothing."""
    overlap: int = 0
    """Percent of its selection that a query shares with the one before it, where there is a top-k: what the inputs of a
    measurement assume, and no engine knows of. 0, independent selections, is what every measurement without it means."""
    provider: Provider | None = None
    """The engine whose kernels run the stages around attention; None for this project's own."""

    @property
    def key(self) -> str:
        """Stable text form, for example ``prefill_attention/c4a/h64/k512``; :meth:`parse` reads it back."""
        parts: list[str] = [self.name, self.layer]
        if self.h_q is not None:
            parts.append(f"h{self.h_q}")
        if self.topk is not None:
            parts.append(f"k{self.topk}")
        if self.overlap:
            parts.append(f"o{self.overlap}")
        if self.provider is not None:
            parts.append(self.provider.key)
        return "/".join(parts)

    @classmethod
    def parse(cls, key: str) -> Site:
        """Read :attr:`key` back. Raises ``ValueError`` on anything that :attr:`key` cannot have written."""
        name, layer, *rest = key.split("/")
        provider = Provider.parse(rest.pop()) if rest and "@" in rest[-1] else None
        numbers = {part[:1]: int(part[1:]) for part in rest}
        site = cls(SiteName(name), LayerType(layer), numbers.get("h"), numbers.get("k"), numbers.get("o", 0), provider)
        if site.key != key:
            raise ValueError(f"not a site key: {key!r}")
        return site

    def overlapping(self, overlap: int) -> Site:
        """The same site with inputs whose neighbours share so much; unchanged where there is no top-k."""
        return self if self.topk is None else replace(self, overlap=overlap)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What measurements assume beyond what a model fixes: those behind one policy agree on it."""

    overlap: int = 0
    """See :attr:`Site.overlap`."""
    provider: Provider | None = None
    """See :attr:`Site.provider`."""

    def at(self, site: Site) -> Site:
        """``site`` under these conditions, whatever its own were."""
        return replace(site.overlapping(self.overlap), provider=self.provider)


PLAIN = Conditions()
"""Independent selections, and this project's own kernels."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a policy needs to know of a model. Layer counts leave out the multi-token-prediction layer."""

    name: str
    layers: tuple[tuple[LayerType, int], ...]
    heads: tuple[int, ...]
    """Query heads per rank that occur, the model's own first; 64 is also what tensor parallelism pads to."""
    topk: int
    max_context: int
    """Longest context of one request, in tokens."""

    @property
    def num_layers(self) -> int:
        """All attention layers of one forward."""
        return sum(count for _, count in self.layers)

    def layer_count(self, layer: LayerType) -> int:
        """Layers of one type; 0 if the model has none."""
        return dict(self.layers).get(layer, 0)

    def site_layers(self, name: SiteName) -> tuple[LayerType, ...]:
        """Layer types of this model that have the site: all for attention, those with an indexer for its metadata."""
        if name is SiteName.PREFILL_ATTENTION:
            return tuple(layer for layer, _ in self.layers)
        return tuple(layer for layer, _ in self.layers if layer in (LayerType.C4A, LayerType.DSA))

    def site(self, name: SiteName, layer: LayerType, h_q: int | None = None) -> Site:
        """The site of one layer type. ``h_q`` None means the model's own head count. Raises :class:`UsageError`."""
        if layer not in self.site_layers(name):
            accepted = ", ".join(
                (*self.site_layers(name), FORWARD)
            )  # wherever a user names a layer, the whole mix goes too
            raise UsageError(f"layer must be one that {self.name} has at {name}: got {layer}; accepted: {accepted}")
        if name is SiteName.INDEXER_METADATA:
            return Site(name, layer)
        topk = self.topk if layer in (LayerType.C4A, LayerType.DSA) else None
        return Site(name, layer, self.check_heads(h_q), topk)

    def check_heads(self, h_q: int | None) -> int:
        """``h_q`` if this model is measured with it, its own head count for None; raises :class:`UsageError` else."""
        if h_q is None:
            return self.heads[0]
        if h_q not in self.heads:
            accepted = ", ".join(map(str, self.heads))
            raise UsageError(f"h_q must be a padded head count of {self.name}: got {h_q}; accepted: {accepted}")
        return h_q


DEEPSEEK_V4_FLASH = ModelConfig(
    name="deepseek-v4-flash",
    layers=((LayerType.SWA_ONLY, 2), (LayerType.C4A, 21), (LayerType.C128A, 20)),
    heads=(64,),
    topk=512,
    max_context=1 << 20,
)
DEEPSEEK_V4_PRO = ModelConfig(
    name="deepseek-v4-pro",
    layers=((LayerType.C4A, 30), (LayerType.C128A, 31)),
    heads=(128, 64),
    topk=1024,
    max_context=1 << 20,
)
DEEPSEEK_V3_2 = ModelConfig(
    name="deepseek-v3.2",
    layers=((LayerType.DSA, 61),),
    heads=(128, 64),
    topk=2048,
    max_context=163840,
)
MODELS: dict[str, ModelConfig] = {m.name: m for m in (DEEPSEEK_V4_FLASH, DEEPSEEK_V4_PRO, DEEPSEEK_V3_2)}
"""By the names that tables have."""

_GLM_5 = replace(DEEPSEEK_V3_2, layers=((LayerType.DSA, 78),), heads=(64,), max_context=202752)
"""V3.2's attention with half its heads, which runs the same kernels on the same shapes and takes the same tables."""
HUGGING_FACE: dict[str, ModelConfig] = {
    "deepseek-ai/DeepSeek-V4-Flash": DEEPSEEK_V4_FLASH,
    "deepseek-ai/DeepSeek-V4-Pro": DEEPSEEK_V4_PRO,
    "deepseek-ai/DeepSeek-V3.2": DEEPSEEK_V3_2,
    "deepseek-ai/DeepSeek-V3.2-Exp": DEEPSEEK_V3_2,
    "zai-org/GLM-5": _GLM_5,
    "zai-org/GLM-5-FP8": _GLM_5,
}
"""By the ids of their checkpoints, as an engine's ``--model`` has them; their names are those of the tables they take."""
_WITHOUT_TABLES = {
    "deepseek-ai/DeepSeek-V4.1-Flash": "its layers of compress ratios 1 and 2 are no site of any measurement yet",
}
"""Models that engines serve and nobody measured, and what is missing."""


def model(name: str) -> ModelConfig:
    """Look a model up by name, or by the id of its checkpoint. Raises :class:`UsageError` that lists the known ones."""
    if name in MODELS:
        return MODELS[name]
    word = name.lower()
    found = next((config for known, config in HUGGING_FACE.items() if known.lower() == word), None)
    if found is not None:
        return found
    accepted = f"{', '.join(MODELS)}, or an id: {', '.join(HUGGING_FACE)}"
    missing = next((why for known, why in _WITHOUT_TABLES.items() if known.lower() == word), None)
    if missing is not None:
        raise UsageError(f"model must be one that has tables: got {name!r}: {missing}; accepted: {accepted}")
    raise UsageError(f"model must be a known one: got {name!r}; accepted: {accepted}")


def attention_sites(models: Iterable[ModelConfig], conditions: Conditions = PLAIN) -> dict[Site, ModelConfig]:
    """Every attention site of ``models`` with all their head counts, each with the last of the models that has it."""
    return {
        conditions.at(model.site(SiteName.PREFILL_ATTENTION, layer, h_q)): model
        for model in models
        for h_q in model.heads
        for layer in model.site_layers(SiteName.PREFILL_ATTENTION)
    }
