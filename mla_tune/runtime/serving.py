"""Which policy file serves an engine on a GPU, how many of its tables, and why not the others.

One answer for everybody: a dispatcher serves what :func:`find_serving` found, and commands print it. It asks no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from mla_tune.errors import PolicyError, UsageError
from mla_tune.hardware.sku import CPU
from mla_tune.policy.codec import digest, parse_policy, read_policy_file
from mla_tune.policy.schema import Policy, Table
from mla_tune.policy.search import Place, PolicyFile, packaged_policies, policy_files, user_policies
from mla_tune.runtime.compatibility import BuildsHere, candidate_faults
from mla_tune.runtime.switches import MODELLED_VARIABLE, Switches
from mla_tune.sites.engines import Engine, table_engine
from mla_tune.sites.provider import OWN, SGLANG, VLLM
from mla_tune.sites.site import MODELS, SiteName

ENGINES: dict[str, tuple[Engine, ...]] = {
    OWN: tuple(Engine),
    SGLANG: (Engine.SGLANG,),
    VLLM: (Engine.VLLM, Engine.VLLM_FEW_HEADS),
}
"""Who can be served, and as which engines each of them reads tables: whoever runs this project's kernels, as any."""


@dataclass(frozen=True, slots=True)
class GpuKey:
    """What a policy must be of: a product, and its SM count where that is known."""

    sku: str
    sm_count: int | None = None

    def __str__(self) -> str:
        units = "threads" if self.sku == CPU else "SMs"
        return self.sku if self.sm_count is None else f"{self.sku} with {self.sm_count} {units}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tables, or one candidate of them, that do not serve, and the one reason of them all."""

    reason: str
    tables: tuple[Table, ...]
    candidate: str | None = None
    """The candidate that is left out of them, where they serve all the same."""

    def __str__(self) -> str:
        what = f"{len(self.tables)}" if self.candidate is None else f"{self.candidate} in {len(self.tables)}"
        return f"{what} ({', '.join(dict.fromkeys(map(_named, self.tables)))}): {self.reason}"


@dataclass(frozen=True, slots=True)
class Serving:
    """The answer for one engine on one GPU."""

    engine: str
    gpu: GpuKey | None
    file: PolicyFile | None = None
    """The file that serves; of several in which no table serves the first; None where there is none."""
    policy: Policy | None = None
    digest: str = ""
    tables: tuple[Table, ...] = ()
    """Those that serve, without the candidates that do not."""
    left_out: tuple[LeftOut, ...] = ()
    passed_over: tuple[str, ...] = ()
    """Files that come before, and why each serves nothing."""
    fault: str | None = None
    """Why the file serves nothing at all, whatever its tables say."""
    overridden: tuple[str, ...] = ()
    """What would keep tables of a named file from serving, and does not, since the user named it."""

    @property
    def total(self) -> int:
        """Tables of the file that the engine reads."""
        return len(self.tables) + sum(len(group.tables) for group in self.left_out if group.candidate is None)

    @property
    def complete(self) -> bool:
        """Whether every table of the file that the engine reads serves, with all of its candidates."""
        return self.file is not None and self.fault is None and not self.left_out and bool(self.tables)

    @property
    def summary(self) -> str:
        """One line: the file, how many tables serve of how many, and the reason for each group that does not."""
        if self.file is None:
            return f"{self.source}: {self.fault}"
        parts = [f"{len(self.tables)} of {self.total} tables serve {self.engine}"]
        parts += [self.fault] if self.fault is not None else map(str, self.left_out)
        parts += [f"although {reason}" for reason in self.overridden]
        return f"{self.source}: {'; '.join([*parts, *(f'passed over {reason}' for reason in self.passed_over)])}"

    @property
    def source(self) -> str:
        """The file, where it was found, its digest, and what was measured on which GPU with whose kernels."""
        if self.file is None:
            return "no policy file"
        if self.policy is None:
            return f"{self.name} ({self.file.place})"
        evidence, of = self.policy.evidence, GpuKey(self.policy.gpu.sku, self.policy.gpu.sm_count)
        whose = f"kernels of {self.policy.provider or 'mla-tune'}"
        return f"{self.name} ({self.file.place}, sha256 {self.digest[:12]}, {evidence} for {of}, {whose})"

    @property
    def name(self) -> str:
        """The file as a reader knows it: a shipped one has one name wherever the package lies."""
        if self.file is None:
            return "no policy file"
        return self.file.path.name if self.file.place is Place.SHIPPED else str(self.file)


def find_serving(
    gpu: GpuKey | None,
    engine: str = OWN,
    switches: Switches | None = None,
    environment: Mapping[str, str] = os.environ,
    *,
    installed: bool = True,
) -> Serving:
    """What serves ``engine`` (a word of :data:`ENGINES`) on ``gpu``, by the builds that are installed here.

    Without ``installed`` it is what serves a machine that has the builds of each policy, as far as the engine runs them.
    The first file in which any table serves: the one that ``switches`` name, then the user's, then the shipped ones. A
    named file serves as it is, whatever differs. Raises :class:`PolicyError` for a named file that cannot be read.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine must be a known word: got {engine!r}; accepted: {', '.join(ENGINES)}")
    switches = Switches() if switches is None else switches
    if gpu is None and switches.policy is None:
        return Serving(engine, gpu, fault="there is no GPU, and no file is named")
    passed: list[Serving] = []
    for file in policy_files("" if gpu is None else gpu.sku, engine, switches.policy, environment):
        serving = _look_into(file, gpu, engine, switches, installed=installed)
        if serving.tables:
            return replace(serving, passed_over=tuple(map(_why_not, passed)))
        passed.append(serving)
    if passed:
        return replace(passed[0], passed_over=tuple(map(_why_not, passed[1:])))
    shipped = ", ".join(name for name in packaged_policies() if "." not in name)
    sku, folder = gpu.sku if gpu else "it", user_policies(environment)
    return Serving(engine, gpu, fault=f"none is for {sku}, in {folder} or among the shipped ones ({shipped})")


def _look_into(file: PolicyFile, gpu: GpuKey | None, engine: str, switches: Switches, *, installed: bool) -> Serving:
    """What one file serves. Raises :class:`PolicyError` for a named one that cannot be read."""
    serving, named = Serving(engine, gpu, file), file.place is Place.NAMED
    try:
        data = read_policy_file(file.path) if isinstance(file.path, os.PathLike) else file.path.read_bytes()
        policy = parse_policy(data, str(file))
    except (PolicyError, OSError) as error:
        if named:
            raise
        return replace(serving, fault=str(error))
    serving = replace(serving, policy=policy, digest=digest(data))
    read = tuple(table for table in policy.tables if _reads(engine, table))
    fault = _evidence_fault(policy, switches, named=named)
    other = _gpu_fault(policy, gpu)
    if fault is not None or (other is not None and not named):
        return replace(serving, fault=fault or other, left_out=_all_left(read, fault or other or ""))
    tables, left_out = _sorted_out(read, BuildsHere(engine, policy.environment.libraries, installed=installed))
    if not named:
        return replace(serving, tables=tables, left_out=left_out)
    return replace(serving, tables=read, overridden=(*([other] if other else ()), *map(str, left_out)))


def _sorted_out(tables: tuple[Table, ...], here: BuildsHere) -> tuple[tuple[Table, ...], tuple[LeftOut, ...]]:
    """The tables that serve with the builds that are ``here``, and the others by their reason."""
    kept: list[Table] = []
    groups: dict[tuple[str, str | None], list[Table]] = {}
    for table in tables:
        faults, reason = candidate_faults(table, here), here.first_fault(table.builds)
        chosen = {choice.candidate for row in table.rows for choice in row.choices}
        if reason is None:
            # Thresholds were fitted with every candidate there: where a row names one, the others cannot stand in for it.
            reason = next((faults[name] for name in sorted(chosen & set(faults))), None)
        if reason is not None:
            groups.setdefault((reason, None), []).append(table)
            continue
        kept.append(_without(table, faults))
        for name, fault in faults.items():
            groups.setdefault((fault, name), []).append(table)
    return tuple(kept), tuple(LeftOut(reason, tuple(of), name) for (reason, name), of in groups.items())


def _without(table: Table, names: Mapping[str, str]) -> Table:
    """``table`` without candidates that none of its rows names."""
    if not names:
        return table
    return msgspec.structs.replace(
        table,
        candidates=tuple(name for name in table.candidates if name not in names),
        candidate_builds=tuple(entry for entry in table.candidate_builds if entry.candidate not in names),
        limits=tuple(limit for limit in table.limits if limit.candidate not in names),
        ineligible=tuple(entry for entry in table.ineligible if entry.candidate not in names),
    )


def _reads(engine: str, table: Table) -> bool:
    site, model = SiteName(table.site), MODELS[table.model]
    if engine == VLLM and site is not SiteName.PREFILL_ATTENTION:
        return False  # vLLM's schedule has one kernel, and no hook of ours
    return any(table_engine(reader, site, model) is table.engine for reader in ENGINES[engine])


def _evidence_fault(policy: Policy, switches: Switches, *, named: bool) -> str | None:
    """A policy that is not measured serves where that is allowed; one that is named unless that is forbidden."""
    if policy.evidence == "measured" or (switches.allow_modelled or (named and switches.allow_modelled is None)):
        return None
    return f"it is {policy.evidence}, and must be measured; {MODELLED_VARIABLE}=1 serves it"


def _gpu_fault(policy: Policy, gpu: GpuKey | None) -> str | None:
    measured = policy.gpu
    if gpu is not None and gpu.sku in measured.skus and gpu.sm_count in (None, measured.sm_count):
        return None
    wanted = " or ".join(str(GpuKey(sku, measured.sm_count)) for sku in measured.skus)
    return f"the GPU must be {wanted}: got {gpu or 'none'}"


def _all_left(tables: tuple[Table, ...], reason: str) -> tuple[LeftOut, ...]:
    return (LeftOut(reason, tables),) if tables else ()


def _why_not(serving: Serving) -> str:
    reasons = [serving.fault] if serving.fault is not None else [group.reason for group in serving.left_out]
    return f"{serving.name}: {'; '.join(dict.fromkeys(reasons)) or f'no table that {serving.engine} reads'}"


def _named(table: Table) -> str:
    return f"{table.site} of {table.model}"
