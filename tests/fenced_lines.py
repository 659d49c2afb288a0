"""Lines that a document shows in a block, for tests that type them."""

from __future__ import annotations

import re
from collections.abc import Iterator


def fenced(text: str, *languages: str) -> Iterator[str]:
    """The lines of fenced blocks in one of ``languages`` (``""``: of no language), continued lines joined."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in languages:
            yield from block.replace("\\\n", " ").splitlines()
