"""One candidate for every shape, as far as its limits reach: what ``MLA_TUNE_MODE=pin:<candidate>`` serves.

A pin is a table whose only row answers the candidate, so that it is compiled and explained like any other, and keeps
the rule that no candidate is answered past its limit.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec

from mla_tune.errors import PolicyError
from mla_tune.policy.decision import ExplainedChoice, Reason
from mla_tune.policy.schema import Choice, Range, Row, Table

EVERY_COUNT = (-(1 << 63), (1 << 63) - 1)
"""Beyond any token count: a pin does not end where the measurements do."""

_log = logging.getLogger("mla_tune")


def pin_table(table: Table, candidate: str, *, modelled: bool = False) -> Table:
    """``table`` with ``candidate`` in place of all its choices; its limits stay.

    In a modelled table the claimed query token counts are a limit too: of another GPU's kernels no other may be known.
    Raises :class:`PolicyError` for a candidate that the table has not measured, whose limits are therefore unknown.
    """
    if candidate not in table.candidates:
        accepted = ", ".join(table.candidates)
        raise PolicyError(
            f"a pinned candidate must be one whose limits were measured for {table.site} of {table.model}, layer "
            f"{table.layer}: got {candidate}; accepted: {accepted}; pin one of them, or sweep that candidate too"
        )
    for barred in table.ineligible:
        if barred.candidate == candidate:
            _log.warning(
                "%s is pinned for %s of %s, and its first call on a new shape takes up to %.1f s",
                *(candidate, table.site, table.model, barred.first_call_s),
            )
    start, end = EVERY_COUNT
    if modelled:
        end = table.measured.num_qo_tokens[1]
    everywhere = Range(num_qo_tokens=(start, end), kv_tokens=EVERY_COUNT, num_reqs=EVERY_COUNT)
    rows = (Row(num_reqs_from=start, kv_tokens_from=start, choices=(Choice(candidate=candidate),)),)
    return msgspec.structs.replace(table, measured=everywhere, rows=rows)


def pinned_reason(found: ExplainedChoice) -> ExplainedChoice:
    """An explanation from a pin's table, in a pin's words: it has no thresholds."""
    reason = Reason.PIN if found.reason is Reason.TABLE else found.reason
    return replace(found, reason=reason, num_reqs_from=None, kv_tokens_from=None, num_qo_tokens_from=None)
