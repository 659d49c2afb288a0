"""The JSON Schema of a policy file, for editors and for checks in other languages.

It is made of :class:`mla_tune.policy.file_form.FileForm`, the form that this project reads, and of the words that a policy
may use. It accepts every file that mla-tune reads; :mod:`mla_tune.policy.rules` says more than a schema can. Beside the
policies it stands as ``policy.schema.json``, which the first line of each file names to the editor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from mla_tune.policy.file_form import SCHEMA_VERSION, FileForm
from mla_tune.policy.kernel_config import LaunchParameters
from mla_tune.policy.rules import EVIDENCE, MAX_INT64, REGIMES
from mla_tune.sites.candidates import CANDIDATES
from mla_tune.sites.launch_parameters import KERNELS
from mla_tune.sites.site import FORWARD, MODELS, OVERLAPS, LayerType

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TOKENS = r"^[1-9][0-9]{0,15}[KM]$"
_BUILD = r"^[a-z0-9]+(-[a-z0-9]+)*==[A-Za-z0-9][A-Za-z0-9.+!_-]*$"


def policy_json_schema() -> dict[str, Any]:
    """The schema, as JSON has it."""
    made = msgspec.json.schema(FileForm)
    parts = {name.lstrip("_"): _part(name.lstrip("_"), part) for name, part in made["$defs"].items()}
    whole: dict[str, Any] = {
        "$schema": _DIALECT,
        "title": f"mla-tune policy, schema {SCHEMA_VERSION}",
        "description": "Which kernel path an engine takes on one GPU, by the size of a forward.",
        "$ref": "#/$defs/FileForm",
        "$defs": parts,
    }
    return {key: _mapped(value, _public) for key, value in whole.items()}


def dump_json_schema() -> bytes:
    """The bytes of ``policy.schema.json``."""
    return msgspec.json.format(msgspec.json.encode(policy_json_schema()), indent=2) + b"\n"


def _part(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """One part of the file: what msgspec knows of it, and of each field what it means and accepts."""
    found = {**part, "title": name}
    fields = {key: {**below, **_FIELDS.get((name, key), {})} for key, below in part.get("properties", {}).items()}
    return {**found, "properties": fields} if fields else found


def _public(value: Any) -> Any:
    """Text without the marks of Sphinx and without the underscores of private names."""
    if not isinstance(value, str):
        return value
    return (
        re.sub(r":[a-z]+:`[~.]?(?:mla_tune\.)?([^`]*)`", r"\1", value)
        .replace("#/$defs/_", "#/$defs/")
        .replace("``", "")
    )


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(below, change) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(below, change) for below in value]
    return change(value)


def _says(description: str, **accepted: Any) -> dict[str, Any]:
    return {"description": description, **accepted}


def _count(low: int = 0) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": MAX_INT64}


def _pair(of: Mapping[str, Any]) -> dict[str, Any]:
    """A closed range."""
    return {"prefixItems": [dict(of), dict(of)]}


def _words(words: Iterable[object]) -> dict[str, Any]:
    return {"enum": sorted({str(word) for word in words})}


def _list(items: Mapping[str, Any], least: int = 0) -> dict[str, Any]:
    return {"items": dict(items), "uniqueItems": True, **({"minItems": least} if least else {})}


_CONTEXT = {
    "anyOf": [_count(), {"type": "string", "pattern": _TOKENS}],
    "description": "Context tokens of all requests together: 1280, 80K (of 1024) or 64M.",
}
_CANDIDATE = _words(candidate.name for found in CANDIDATES.values() for candidate in found)
_BUILDS = {"type": "string", "pattern": _BUILD}
_LAUNCH = {
    "type": "object",
    "properties": {key: {"type": "integer"} for key in ("size_from", *LaunchParameters.__struct_fields__)},
    "additionalProperties": False,
}

_FIELDS: dict[tuple[str, str], dict[str, Any]] = {
    ("FileForm", "schema"): {"const": SCHEMA_VERSION, "description": "Version of this form."},
    ("FileForm", "gpu"): _says("The product that the policy is for."),
    ("FileForm", "evidence"): _says("Whether this very product was measured.", **_words(EVIDENCE)),
    ("FileForm", "scaled_from"): _says("The product that was measured, of a modelled policy."),
    ("FileForm", "regime"): _says(
        "The time that the thresholds minimize: the GPU's, or the host's too.", **_words(REGIMES)
    ),
    ("FileForm", "environment"): _says("The machine and software that was measured."),
    ("FileForm", "source"): _says("The measurements behind the policy."),
    ("FileForm", "overlap"): _says(
        "Percent of its selection that a query shares with the one before.", enum=[*OVERLAPS]
    ),
    ("FileForm", "provider"): _says("Engine whose kernels ran around attention; left out for mla-tune's own."),
    ("FileForm", "kernel_config"): _says(
        "Tuned launch parameters of mla-tune's own kernels, by size.",
        properties={name: {"type": "array", "items": _LAUNCH} for name in KERNELS},
        additionalProperties=False,
    ),
    ("FileForm", "common"): _says("What holds for every entry that does not say otherwise."),
    ("FileForm", "tables"): _says("The choices, site by site."),
    ("Gpu", "sku"): _says("Canonical name: nvidia-h200.", pattern="^[a-z0-9][a-z0-9-]*$"),
    ("Gpu", "sm_count"): _says("Streaming multiprocessors; threads of a CPU.", **_count(1)),
    ("Gpu", "also"): _says("Further products with the same datasheet figures, of a modelled policy."),
    ("PolicyEnvironment", "driver"): _says("Release of the GPU's driver."),
    ("PolicyEnvironment", "cuda"): _says("Release of CUDA that torch was built with."),
    ("PolicyEnvironment", "torch"): _says("Release of torch."),
    ("PolicyEnvironment", "triton"): _says("Release of Triton."),
    ("PolicyEnvironment", "shared_memory_optin_bytes"): _says("Shared memory that a block may ask for.", **_count()),
    ("PolicyEnvironment", "libraries"): _says("Kernel libraries that ran."),
    ("Library", "name"): _says("Its distribution: sgl-flash-mla.", minLength=1),
    ("Library", "version"): _says("Its release."),
    ("Library", "sha256"): _says("Digest of its files: two builds of one release differ by it."),
    ("Source", "file"): _says("The committed export, from the folder of the checkout."),
    ("Source", "sha256"): _says("Digest of that file when the policy was made."),
    ("Source", "measurements"): _says("How many of its timings count.", **_count(1)),
    ("Source", "command"): _says("What makes the same bytes again."),
    ("Common", "builds"): _says("Kernel libraries that the tables depend on.", **_list(_BUILDS)),
    ("Common", "measured"): _says("Ranges that the measurements cover; outside them the incumbent is kept."),
    ("Measured", "query_tokens"): _says("Query tokens of a forward, all requests together.", **_pair(_count(1))),
    ("Measured", "context"): _says("Context tokens of a forward, all requests together.", **_pair(_CONTEXT)),
    ("Measured", "requests"): _says("Requests in a forward.", **_pair(_count(1))),
    ("Sites", "prefill_attention"): _says("How sparse attention reads the KV cache in a prefill."),
    ("Sites", "indexer_metadata"): _says("Who computes the schedule of the indexer."),
    ("Tables", "for"): _says("The tables that this entry stands for: every combination."),
    ("Tables", "choose"): _says("What there is to choose from."),
    ("Tables", "builds"): _says("What the incumbent ran on, where it is not the common one."),
    ("Tables", "candidate_builds"): _says("What a candidate depends on besides; without it the others choose."),
    ("Tables", "measured"): _says("Ranges of these tables, where they are not the common ones."),
    ("Tables", "limits"): _says(
        "Query tokens up to which a candidate runs, as probed with this build; past them it is never taken.",
        propertyNames=_CANDIDATE,
        additionalProperties=_count(),
    ),
    ("Tables", "slow_first_call_s"): _says(
        "Candidates that are never taken, each with the seconds that a new shape costs.",
        propertyNames=_CANDIDATE,
        additionalProperties={"type": "number", "minimum": 0},
    ),
    ("Tables", "choices"): _says(
        "The last requests_from and context_from that are reached say which lines count; of these the last whose "
        "query_tokens_from is reached decides.",
        minItems=1,
    ),
    ("Keys", "models"): _says("Models.", **_list(_words(MODELS), 1)),
    ("Keys", "heads"): _says("Query heads per rank, as the kernel sees them.", **_list(_count(1))),
    ("Keys", "layers"): _says(
        "Layer types, or forward: one choice for a whole forward.", **_list(_words((*LayerType, FORWARD)), 1)
    ),
    ("Keys", "engine"): _says("The engine that chooses; left out for SGLang."),
    ("Choose", "among"): _says("Every candidate that was measured.", **_list(_CANDIDATE, 1)),
    ("Choose", "incumbent"): _says("What the engine takes without a policy.", **_CANDIDATE),
    ("Line", "requests_from"): _says("Least requests of the forward.", **_count()),
    ("Line", "context_from"): {
        **_CONTEXT,
        "description": "Least context tokens of the forward, all requests together.",
    },
    ("Line", "take"): _says("The candidate that is taken.", **_CANDIDATE),
    ("Line", "query_tokens_from"): _says(
        "Least query tokens of the forward: a count, or two rising counts at two rising contexts, {1K: 15, 80K: 54}.",
        anyOf=[
            _count(),
            {
                "type": "object",
                "propertyNames": {"pattern": r"^(0|[1-9][0-9]{0,15}[KM]?|[1-9][0-9]{15,18})$"},
                "additionalProperties": _count(),
                "minProperties": 2,
                "maxProperties": 2,
            },
        ],
    ),
}
"""Of each field what an editor shows for it, and what is accepted beyond its type."""
