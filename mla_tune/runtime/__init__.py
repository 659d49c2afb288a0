"""What a serving engine imports: load a policy once, resolve a site once per model, then look up.

Standard library, PyYAML and msgspec only.
"""

from mla_tune.runtime.dispatcher import Dispatcher, Resolved

__all__ = ["Dispatcher", "Resolved"]
