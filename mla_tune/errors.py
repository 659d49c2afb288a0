"""The project's exceptions: one base and a few leaves.

Every message is one line: the rule that was broken, the value that broke it, what is accepted, and the next step.
The command line prints that line and exits; nothing in this package shows a user a traceback.
"""


class MlaTuneError(Exception):
    """Base of everything that mla-tune raises on purpose.

    ``exit_code`` is what the command line exits with: 2 for a wrong argument, 3 for a missed goal, 1 for the rest.
    """

    exit_code = 1


class UsageError(MlaTuneError):
    """An argument is wrong: an unknown model, a layer that the model lacks, a shape that cannot exist."""

    exit_code = 2


class PolicyError(MlaTuneError):
    """A policy file is missing, malformed, of an unknown schema, or has no table for what was asked."""


class GoalMissedError(MlaTuneError):
    """A policy was measured and lost more than it may; the figures are printed before."""

    exit_code = 3


class EnvironmentMismatchError(MlaTuneError):
    """The machine is not the one that was measured: another GPU, another SM count, another kernel build."""


class StoreError(MlaTuneError):
    """A measurement database or export cannot be read or written; the file is left as it was."""


class FitError(MlaTuneError):
    """The measurements do not support a policy: none for a site, or no held-out point to judge it by."""


class TraceError(MlaTuneError):
    """A profiler's trace is cut short, damaged or no trace, or two of them cannot be compared."""


class MissingPackageError(MlaTuneError):
    """An optional dependency is absent; the message names the package and the extra that installs it."""
