"""What answers for a server: the one place where a GPU, an engine and a named file become what decides.

A question without ``--as-served`` is about a server that has the builds of its policy, wherever it is asked; with it, about
this machine: its GPU, the builds that are installed, the ``MLA_TUNE_*`` variables that are set.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mla_tune.cli.options import chosen_sites
from mla_tune.errors import EnvironmentMismatchError, MlaTuneError, PolicyError, UsageError
from mla_tune.hardware.nvml import GpuIdentity, detect_gpu
from mla_tune.hardware.sku import CPU, SKUS, resolve_sku
from mla_tune.policy.codec import load_policy
from mla_tune.policy.evidence import PolicyEvidence, load_evidence
from mla_tune.policy.schema import Policy, Table
from mla_tune.runtime.compatibility import differences
from mla_tune.runtime.dispatcher import Dispatcher, Resolved
from mla_tune.runtime.serving import GpuKey, Serving, find_serving
from mla_tune.runtime.switches import Switches
from mla_tune.sites.engines import Engine
from mla_tune.sites.provider import OWN, SGLANG, VLLM
from mla_tune.sites.site import FORWARD, LayerType, SiteName
from mla_tune.sites.site import model as find_model

WORDS: dict[str, tuple[str, Engine]] = {
    SGLANG: (SGLANG, Engine.SGLANG),
    VLLM: (VLLM, Engine.VLLM),
    "vllm-few-heads": (VLLM, Engine.VLLM_FEW_HEADS),
    OWN: (OWN, Engine.OWN),
}
"""What ``--engine`` accepts: whose plugin serves, and as which engine it reads tables."""

EngineOption = Annotated[
    str, typer.Option("--engine", help="Who is served: sglang, vllm, vllm-few-heads (below 32 heads a rank) or own.")
]
GpuOption = Annotated[
    str, typer.Option("--gpu", help="The server's GPU: h200, b200, ..., cpu; auto is the one in this machine.")
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="Policy file (default: the user's, else the shipped one, as a server does)."),
]
AllowModelledOption = Annotated[
    bool, typer.Option("--allow-modelled", help="Answer by a modelled policy too, as MLA_TUNE_ALLOW_MODELLED=1 does.")
]

Rows = dict[str, object]


@dataclass(frozen=True, slots=True)
class Question:
    """What the options of a command name."""

    engine: str = SGLANG
    gpu: str = "auto"
    policy: Path | None = None
    allow_modelled: bool = False


@dataclass(frozen=True, slots=True)
class Answering:
    """What decides, and what there is to say of it."""

    word: str
    """The engine, as ``--engine`` has it."""
    serving: Serving
    dispatcher: Dispatcher
    named: bool
    """Whether the user named the file: what it lacks is then refused, and not left to the engine."""
    as_served: bool = False
    context: tuple[str, ...] = ()
    """How this machine's software differs from the measured one where nothing depends on it."""

    @property
    def engine(self) -> Engine:
        """As whom tables are read."""
        return WORDS[self.word][1]

    @property
    def policy(self) -> Policy:
        """The file's policy. Raises :class:`PolicyError` where no file could be read."""
        if self.serving.policy is None:
            raise PolicyError(f"a policy must be there: {self.serving.summary}")
        return self.serving.policy

    @property
    def gpu(self) -> str:
        """The GPU that was asked about."""
        return "no GPU" if self.serving.gpu is None else str(self.serving.gpu)

    @property
    def stated(self) -> PolicyEvidence | None:
        """What stands beside the policy. Raises :class:`PolicyError` for what is another's."""
        return None if self.serving.file is None else load_evidence(str(self.serving.file), self.serving.digest)

    def resolve(
        self, site: str, model: str, layer: str = FORWARD, h_q: int | None = None, engine: Engine | None = None
    ) -> Resolved:
        """Who chooses at a place, as the plugin asks; the engine itself where no table serves there.

        Raises :class:`UsageError` for a place that the model does not have, and :class:`PolicyError` where a named file
        has no table of it.
        """
        (name,), config = chosen_sites([site]), find_model(model)
        if layer in list(LayerType):
            config.site(name, LayerType(layer), h_q)
        elif name is SiteName.PREFILL_ATTENTION:
            h_q = config.check_heads(h_q)
        with _unlogged():
            return self.dispatcher.resolve(
                name,
                model=model,
                layer=layer,
                h_q=h_q,
                engine=engine or self.engine,
                fallback=None if self.named else "incumbent",
            )

    def table(self, site: str, model: str, layer: str = FORWARD, h_q: int | None = None) -> Table:
        """The table of a place. Raises :class:`PolicyError` with the reason where the engine chooses by itself."""
        found = self.resolve(site, model, layer, h_q)
        if found.table is None:
            raise PolicyError(
                f"a choice is explained and judged by its table: {self.word} has none here: {found.fallback}"
            )
        return found.table

    def lines(self) -> list[str]:
        """Which policy, GPU, provider and evidence answer, and for what machine, in a line each."""
        lines = [f"{self.word} on {self.gpu}: {self.dispatcher.summary}", self._machine()]
        return [*lines, *([f"for context, no mismatch: {'; '.join(self.context)}"] if self.context else [])]

    def _machine(self) -> str:
        if not self.as_served:
            return (
                "answered for a server that has the builds of this policy; lookup --as-served answers for this machine"
            )
        variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MLA_TUNE_")]
        return f"as served on this machine, by what is installed and set: {', '.join(variables) or 'no MLA_TUNE_ variable'}"

    def as_json(self) -> Rows:
        """The same facts for scripts."""
        found, policy = self.serving, self.serving.policy
        return {
            "engine": self.word,
            "gpu": None if found.gpu is None else found.gpu.sku,
            "builds": "installed" if self.as_served else "those of the policy",
            "summary": self.dispatcher.summary,
            "mode": self.dispatcher.switches.mode,
            "context": list(self.context),
            **serving_json(found),
            "provider": None if policy is None else policy.provider or OWN,
        }


def serving_json(found: Serving) -> Rows:
    """A policy file and how much of it serves."""
    policy = found.policy
    return {
        "policy": None if found.file is None else found.name,
        "place": None if found.file is None else str(found.file.place),
        "sha256": found.digest or None,
        "evidence": None if policy is None else policy.evidence,
        "measured_for": None if policy is None else list(policy.gpu.skus),
        "serving": len(found.tables),
        "tables": found.total,
        "reasons": [found.fault] if found.fault else [str(group) for group in found.left_out],
        "passed_over": list(found.passed_over),
    }


def answering(question: Question) -> Answering:
    """What answers for a server that has the builds of its policy.

    Raises :class:`UsageError` where no GPU is named and none is here, and for a file that is another GPU's or another
    engine's, and :class:`PolicyError` for one that cannot be read.
    """
    provider, _ = checked_engine(question.engine)
    named = question.policy is not None
    gpu = _gpu_of_file(question) if named else _gpu_named(question.gpu)
    switches = Switches(
        policy=None if question.policy is None else str(question.policy),
        allow_modelled=True if question.allow_modelled else None,
    )
    found = find_serving(gpu, provider, switches, installed=False)
    if named and not found.tables:
        tables = found.policy.tables if found.policy else ()
        accepted = ", ".join(sorted({str(table.engine) for table in tables}))
        raise UsageError(
            f"--policy must have tables that {question.engine} reads: {question.policy} has those of {accepted} alone; "
            "name another file or another --engine"
        )
    with _unlogged():
        dispatcher = (
            Dispatcher(found.policy, source=found.name, digest=found.digest, switches=switches, serving=found)
            if found.tables
            else Dispatcher(None, source=found.summary, fallback="incumbent", switches=switches)
        )
    return Answering(question.engine, found, dispatcher, named)


def as_served(question: Question) -> Answering:
    """What answers for a server on this machine, as its plugin loads it.

    Raises :class:`UsageError` for options that name anything else.
    """
    provider, _ = checked_engine(question.engine)
    if question.policy is not None or question.allow_modelled:
        raise UsageError(
            "--as-served reads the variables of a server: got --policy or --allow-modelled beside it; set MLA_TUNE_POLICY "
            "or MLA_TUNE_ALLOW_MODELLED instead"
        )
    here = _gpu_here()
    if question.gpu != "auto" and (here is None or resolve_sku(question.gpu) != here.sku):
        raise UsageError(
            f"--as-served answers for the GPU of this machine: got --gpu {question.gpu}, here is "
            f"{here.sku if here else 'no NVIDIA GPU'}; leave --as-served out to ask about another server"
        )
    with _unlogged():
        dispatcher = Dispatcher.for_this_gpu(fallback="incumbent", provider=provider)
    key = None if here is None else GpuKey(here.sku, here.sm_count)
    found = dispatcher.serving or _not_serving(dispatcher, key, provider)
    context = () if found.policy is None else tuple(differences(found.policy, here.driver if here else None))
    return Answering(question.engine, found, dispatcher, named=False, as_served=True, context=context)


def checked_engine(word: str) -> tuple[str, Engine]:
    """Whose plugin serves, and as which engine it reads. Raises :class:`UsageError`."""
    if word not in WORDS:
        raise UsageError(f"--engine must be a known engine: got {word!r}; accepted: {', '.join(WORDS)}")
    return WORDS[word]


def _not_serving(dispatcher: Dispatcher, gpu: GpuKey | None, provider: str) -> Serving:
    """What there is of a file from which nothing serves here."""
    nothing = Serving(provider, gpu, fault=dispatcher.source)
    if dispatcher.switches.off is not None:
        return nothing
    try:
        found = find_serving(gpu, provider, dispatcher.switches)
    except MlaTuneError:
        return nothing
    return nothing if found.tables else found


def _gpu_here() -> GpuIdentity | None:
    try:
        return detect_gpu()
    except EnvironmentMismatchError:  # there is one, and nobody can tell which: what is served then says why
        return None


def _gpu_named(word: str) -> GpuKey:
    if word != "auto":
        return GpuKey(resolve_sku(word))
    here = detect_gpu()
    if here is None:
        accepted = ", ".join((*(sku.name.removeprefix("nvidia-") for sku in SKUS), CPU))
        raise UsageError(f"--gpu must name the server's GPU where none is in this machine; accepted: {accepted}")
    return GpuKey(here.sku, here.sm_count or None)


def _gpu_of_file(question: Question) -> GpuKey:
    """The GPU of the named file, which the named GPU must be."""
    of = load_policy(str(question.policy)).gpu
    if question.gpu == "auto":
        return GpuKey(of.sku)
    asked = resolve_sku(question.gpu)
    if asked not in of.skus:
        raise UsageError(
            f"--policy must be of the GPU that --gpu names: {question.policy} is for {' and '.join(of.skus)}, --gpu names "
            f"{asked}; leave one of the two out"
        )
    return GpuKey(asked)


@contextmanager
def _unlogged() -> Iterator[None]:
    """What a dispatcher logs for a server is what the command prints."""
    log = logging.getLogger("mla_tune")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
