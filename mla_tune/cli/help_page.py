"""What every command's ``--help`` and a shell's completion have beside a command's own text: types in words, and values.

Both are set on the commands that typer has built, once and for all of them: an option is called the same in every command,
so its word and its values are found by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from mla_tune.cli.answering import WORDS
from mla_tune.hardware.sku import CPU, SKUS
from mla_tune.sites.candidates import CANDIDATES
from mla_tune.sites.launch_parameters import KERNELS
from mla_tune.sites.provider import PROVIDERS
from mla_tune.sites.site import FORWARD, MODELS, OVERLAPS, LayerType, SiteName

_WORDS = {
    "BYTES": ("max-workspace-bytes",),
    "COUNT": ("agents", "batches", "concurrency", "points", "repeat", "spot-check", "turns"),
    "FACTOR": ("speed",),
    "FILE": (
        *("check", "db", "forwards", "html", "measurements", "out", "policy", "record", "trace", "traffic"),
        "png",
    ),
    "GPU": ("from", "gpu", "to"),
    "HEADS": ("h-q",),
    "ID": ("environment",),
    "LOW:HIGH": ("context", "extends", "fresh", "new"),
    "MICROSECONDS": ("decode-us", "rest-us", "rest-us-per-token"),
    "MILLISECONDS": ("pause-ms",),
    "PERCENT": ("overlap",),
    "SECONDS": ("budget", "first-call-bound", "timeout"),
    "TOKENS": ("max", "prompt"),
}
"""Words that say more of a value than its type does; any other option is called by its own name."""

_WORD_OF = {option: word for word, options in _WORDS.items() for option in options}
_BY_TYPE = {"int": "NUMBER", "float": "NUMBER"}

_VALUES: dict[str, Callable[[], Iterator[str]]] = {
    "candidate": lambda: (found.name for listed in CANDIDATES.values() for found in listed),
    "effort": lambda: iter(("quick", "default", "full")),
    "engine": lambda: iter(WORDS),
    "gpu": lambda: iter(("auto", CPU, *(sku.name.removeprefix("nvidia-") for sku in SKUS))),
    "kernel": lambda: iter(KERNELS),
    "layer": lambda: iter((*map(str, LayerType), FORWARD)),
    "model": lambda: iter(MODELS),
    "overlap": lambda: map(str, OVERLAPS),
    "provider": lambda: iter(PROVIDERS),
    "regime": lambda: iter(("graph", "eager")),
    "site": lambda: map(str, SiteName),
    "to": lambda: (sku.name.removeprefix("nvidia-") for sku in SKUS),
}
"""Values that a shell completes after an option."""


def complete_help(command: Any) -> None:
    """Set the words and values of every option and argument of ``command``, a group, and of all below it.

    ``Any``: typer has its own copy of click's classes in some releases and uses click's in others.
    """
    for parameter in command.params:
        _name_type(parameter)
        _offer_values(parameter)
    for below in getattr(command, "commands", {}).values():
        complete_help(below)


def _option(parameter: Any) -> str:
    """``h-q`` for ``--h-q``; an argument's own name."""
    return str(max(parameter.opts, key=len)).lstrip("-")


def _name_type(parameter: Any) -> None:
    name = _option(parameter)
    choices = _choices(parameter)
    if not getattr(parameter, "is_flag", False) and parameter.metavar is None:
        parameter.metavar = _word(parameter, name)
        if choices and parameter.help and choices[0] not in parameter.help:
            parameter.help = f"{parameter.help.rstrip('.')}: {', '.join(choices[:-1])} or {choices[-1]}."
    if parameter.param_type_name == "argument":
        parameter.display_type_rich = _nothing  # typer 0.29 puts the type of the implementation after the word


def _word(parameter: Any, name: str) -> str:
    if name in _WORD_OF and parameter.param_type_name == "option":
        return _WORD_OF[name]
    descriptor = getattr(parameter, "type_descriptor", None)
    if descriptor is not None and getattr(descriptor.annotation, "__name__", "") in _BY_TYPE:
        return _BY_TYPE[descriptor.annotation.__name__]
    return re.sub(r"[^A-Z]+", "_", name.upper())


def _nothing(**_: object) -> None:
    return None


def _choices(parameter: Any) -> list[str]:
    """The values of an enumeration, as a user types them."""
    found = getattr(getattr(parameter, "type_descriptor", None) or parameter.type, "choices", None)
    return [str(getattr(choice, "value", choice)) for choice in found or ()]


def _offer_values(parameter: Any) -> None:
    offered = _VALUES.get(_option(parameter))
    if offered is None or parameter.param_type_name == "argument" or parameter.is_flag:
        return

    def complete(context: Any, parameter: Any, incomplete: str) -> list[str]:
        return [value for value in dict.fromkeys(offered()) if value.startswith(incomplete)]

    # click's and typer's own name for it: the argument of the constructor is out of reach here.
    parameter._custom_shell_complete = complete
