"""What ``model`` prints: the policies that it wrote, and each published figure beside its prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table as RichTable

from mla_tune.cli.output.policy_output import policy_json, policy_summary
from mla_tune.cli.output.render import console, note
from mla_tune.fit.published_check import Checked
from mla_tune.fit.table_rows import FittedPolicy


def modelled(policies: Sequence[tuple[FittedPolicy, Path]], checks: Sequence[Checked], as_json: bool) -> None:
    """Everything that one call of ``model`` has to say."""
    if as_json:
        written = [policy_json(fitted.policy, fitted.evidence, str(path)) for fitted, path in policies]
        print(json.dumps({"policies": written, "checks": [_json(entry) for entry in checks]}))
        return
    for fitted, path in policies:
        policy_summary(fitted.policy, fitted.evidence, str(path), as_json=False)
        if fitted.evidence.modelled is not None:
            note(f"limits of {fitted.policy.scaled_from}: {fitted.evidence.modelled.limits}")
        print(f"modelled policy written to {path}")
    if checks:
        _checks(checks)


def _checks(checks: Sequence[Checked]) -> None:
    table = RichTable(
        "published figure",
        "GPU",
        "predicted ms",
        "published ms",
        "ratio",
        "stated",
        title="predicted against published",
    )
    for entry in checks:
        figure = entry.published
        if entry.predicted_ms is None or entry.ratio is None:
            predicted, ratio, verdict = "-", "-", "not covered"
        else:
            predicted, ratio = f"{entry.predicted_ms:.3f}", f"{entry.ratio:.2f}"
            verdict = f"+-{entry.uncertainty:.2f}: {'inside' if entry.inside else 'OUTSIDE'}"
        what = f"{figure.what} ({figure.source}; {figure.assumed})"
        table.add_row(what, figure.sku, predicted, f"{figure.published_ms:.3f}", ratio, verdict)
    console.print(table)
    judged = [entry for entry in checks if entry.inside is not None]
    inside = sum(bool(entry.inside) for entry in judged)
    worst = max((entry.off for entry in judged), default=0.0)
    console.print(
        f"{inside} of {len(judged)} predictions within their stated uncertainty (a logarithm, both ways); "
        f"the worst is off by exp({worst:.2f}); {len(checks) - len(judged)} figures not covered by a stage",
        highlight=False,
    )


def _json(entry: Checked) -> dict[str, object]:
    figure = entry.published
    return {
        "what": figure.what,
        "sku": figure.sku,
        "source": figure.source,
        "assumed": figure.assumed,
        "published_ms": figure.published_ms,
        "predicted_ms": entry.predicted_ms,
        "ratio": entry.ratio,
        "uncertainty": entry.uncertainty,
        "inside": entry.inside,
    }
