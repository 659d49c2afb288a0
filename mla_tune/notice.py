"""What a user should know and no exception says: one line in the log, the first time that a process meets it.

Standard library only. A worker process sends its lines to the process that started it, which says them.
"""

from __future__ import annotations

import logging

_log = logging.getLogger("mla_tune")
_said: set[str] = set()


def say_once(line: str) -> None:
    """Log ``line`` as a warning, unless this process has done so already."""
    if line not in _said:
        _said.add(line)
        _log.warning("%s", line)
