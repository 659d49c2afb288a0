"""What a serving engine imports: load a policy once, resolve a site once per model, then look up.

Standard library, PyYAML and msgspec only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mla_tune.runtime.dispatcher import Dispatcher, Resolved

__all__ = ["Dispatcher", "Resolved"]


def __getattr__(name: str) -> Any:
    """Load the dispatcher when it is asked for: most processes of an engine read its switches and nothing more."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mla_tune.runtime import dispatcher

    return getattr(dispatcher, name)
