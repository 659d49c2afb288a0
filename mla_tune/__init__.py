"""mla-tune: measured kernel choices for DeepSeek-V4 and V3.2 prefill.

Importing this package loads nothing else. A server imports :mod:`mla_tune.runtime`; everything that measures or fits
lives behind the ``mla-tune`` command and the ``tune`` extra.
"""

__version__ = "0.2.0"
