"""Whether a policy's builds are those that are installed here: a table with another build serves nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mla_tune.hardware.builds import Build, installed_version
from mla_tune.policy.lint import Severity
from mla_tune.policy.schema import Policy
from mla_tune.runtime.compatibility import BuildsHere
from mla_tune.sites.provider import OWN


def stale_builds(policy: Policy) -> Iterator[tuple[Severity, str]]:
    """An error for each build that is installed otherwise, and one warning for those that are not installed at all."""
    engine = policy.provider.partition("@")[0] if policy.provider else OWN
    here = BuildsHere(engine, policy.environment.libraries)
    concerned: Counter[str] = Counter()
    for table in policy.tables:
        own = (build for entry in table.candidate_builds for build in entry.builds)
        concerned.update({*table.builds, *own})
    faults = {text: fault for text in concerned if (fault := here.fault(text)) is not None}
    absent = [text for text in faults if installed_version(Build.parse(text).name) is None]
    for text in sorted(set(faults) - set(absent)):
        yield Severity.ERROR, f"{concerned[text]} tables, or candidates of theirs, do not serve here: {faults[text]}"
    if absent:
        yield (
            Severity.WARNING,
            f"not installed here, so whether tables are stale is not known: {', '.join(sorted(absent))}",
        )
