"""Why nothing ran, and why tables are missing: each reason once, with the cure that helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from mla_tune.cli import pipeline
from mla_tune.cli.missing_tables import lost_tables, no_attention_runs, reason_lines, require_attention
from mla_tune.errors import FitError
from mla_tune.policy.codec import load_policy
from mla_tune.policy.schema import Policy, Table
from mla_tune.sites.site import Site
from mla_tune.store.export import read_export, write_export
from mla_tune.store.measurement import Measurement, Outcome

CPU = Path(__file__).parents[2] / "db" / "cpu.jsonl"
SM120 = "FlashMLA has kernels for sm90 and sm100; this GPU is sm120"
C4A, C128A = Site.parse("prefill_attention/c4a/h64/k512"), Site.parse("prefill_attention/c128a/h64")
METADATA = Site.parse("indexer_metadata/c4a")


def without_attention() -> tuple[Measurement, ...]:
    """The committed measurements of a CPU, as if no attention candidate could run."""
    rows = read_export(CPU).measurements
    blank: dict[str, object] = {
        "outcome": Outcome.UNSUPPORTED,
        "detail": SM120,
        "latency_us": None,
        "ci_low_us": None,
        "ci_high_us": None,
    }
    blank |= {"num_samples": 0, "samples_us": (), "stopped_by": None, "first_call_s": None, "workspace_bytes": None}
    return tuple(replace(row, **blank) if row.site.h_q else row for row in rows)  # type: ignore[arg-type]


def test_each_reason_is_said_once_with_what_it_holds_for() -> None:
    reasons = {(site, name): SM120 for site in (C4A, C128A) for name in ("sparse_fwd", "with_kvcache")}
    assert reason_lines({**reasons, (METADATA, "jit"): None}) == [
        f"cannot run here: sparse_fwd, with_kvcache at 2 sites ({C4A.key}, ...): {SM120}"
    ]
    assert no_attention_runs({**reasons, (METADATA, "jit"): None}) == SM120
    assert no_attention_runs({**reasons, (C4A, "sparse_fwd"): None}) is None
    assert no_attention_runs({(METADATA, "jit"): None}) is None


def test_a_fit_without_any_attention_table_gives_the_reason_and_writes_nothing(tmp_path: Path) -> None:
    found = read_export(CPU)
    write_export(tmp_path / "x.jsonl", found.environment, without_attention())
    with pytest.raises(FitError, match="no attention candidate ran: FlashMLA has kernels for sm90"):
        pipeline.fit(tmp_path / "x.jsonl", tmp_path / "x.yaml")
    assert not (tmp_path / "x.yaml").exists()


def test_what_was_not_swept_for_attention_needs_no_table_of_it() -> None:
    require_attention([row for row in read_export(CPU).measurements if row.site.h_q is None])


def test_a_lost_table_comes_with_the_cure_that_brings_it_back() -> None:
    policy = load_policy(CPU.parents[1] / "policies" / "cpu.yaml")
    rows = read_export(CPU).measurements
    few = replace_tables(policy, [])
    everything = lost_tables(policy.tables, few, rows)
    assert all("a larger --budget" in line for line in everything)
    filtered = [row for row in rows if row.site.h_q is None]
    attention = [table for table in policy.tables if table.h_q is not None]
    assert all("without --model and --site" in line for line in lost_tables(attention, few, filtered))
    few_candidates = [row for row in rows if row.candidate in ("sparse_fwd", "with_kvcache")]
    variants = [table for table in policy.tables if table.engine == "mla-tune"]
    mixed = [table for table in policy.tables if "with_kvcache_mixed" in table.candidates]
    for table in [*variants, *mixed]:
        (line,) = lost_tables([table], few, few_candidates)
        assert line.endswith("that this one lacks: the sweep left its candidates out: sweep with --effort full")
    assert lost_tables(policy.tables, policy, rows) == ()


def replace_tables(policy: Policy, tables: list[Table]) -> Policy:
    return msgspec.structs.replace(policy, tables=tuple(tables))
