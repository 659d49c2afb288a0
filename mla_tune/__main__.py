"""``python -m mla_tune`` is the ``mla-tune`` command."""

from mla_tune.cli import main

main()
