"""What is wrong with a command line, in one line that shows the wrong value."""

from __future__ import annotations

from typing import Any

_PARSED = {"int_parsing": "a whole number", "int_from_float": "a whole number", "float_parsing": "a number"}
"""What a value must be that typer could not read, by the kind of its refusal."""


def described(problem: Any) -> str:
    """The refusal ``problem`` of a malformed command line, without a full stop.

    ``Any``: typer has its own copy of click's exceptions in some releases and uses click's in others. Releases that read
    numbers with pydantic leave the value out of their message.
    """
    text = str(problem.format_message()).strip().rstrip(".").replace(": Value error, ", ": ")
    details: list[dict[str, object]] = getattr(problem.__cause__, "errors", list)()
    kind = str(details[0].get("type")) if details else ""
    if kind not in _PARSED:
        return text
    where, _, _ = text.partition(": ")
    return f"{where}: it must be {_PARSED[kind]}: got {str(details[0].get('input'))[:60]!r}"
