"""The commands, put together."""

from __future__ import annotations

import os
from collections.abc import Sequence

import typer

from mla_tune import __version__
from mla_tune.cli import (
    chunking,
    databases,
    doctoring,
    ensuring,
    help_page,
    machine,
    modelling,
    planning,
    policies,
    probing,
    reporting,
    reviewing,
    spotting,
    sweeping,
    trace_diffing,
    trace_recording,
    traffic_command,
    tuning,
    validating,
)
from mla_tune.cli.refused_arguments import described
from mla_tune.errors import UsageError

_UsageProblem: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
"""Base of the exceptions for a malformed command line; typer has moved it between releases, but not in the hierarchy."""

_COMPLETION = "_MLA_TUNE_COMPLETE"

app = typer.Typer(
    help="Measured kernel choices for DeepSeek-V4 and V3.2 prefill: sweep a GPU, fit the crossovers, serve a policy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(sweeping.sweep)
app.command()(ensuring.ensure)
app.command()(policies.fit)
app.command()(modelling.model)
app.command()(policies.lookup)
app.command()(policies.explain)
app.command()(reporting.report)
app.command()(probing.probe)
app.command()(tuning.tune)
app.command()(validating.validate)
app.command()(traffic_command.traffic)
app.command()(spotting.spot_check)
app.command()(chunking.chunks)
app.command()(planning.plan)
app.command()(trace_recording.trace)
app.command()(trace_diffing.trace_diff)
app.command()(machine.verify)
app.command()(machine.env)
app.command()(doctoring.doctor)

_database = typer.Typer(help="Measurement databases and their committed exports.", no_args_is_help=True)
_database.command("export")(databases.export)
_database.command("import")(databases.import_)
_database.command("ls")(databases.ls)
app.add_typer(_database, name="db")

_policy = typer.Typer(help="Policy files.", no_args_is_help=True)
_policy.command("show")(policies.show)
_policy.command("diff")(reviewing.diff)
_policy.command("lint")(reviewing.lint)
_policy.command("schema")(reviewing.schema)
app.add_typer(_policy, name="policy")


def _version(value: bool) -> None:
    if value:
        print(f"mla-tune {__version__}")
        raise typer.Exit


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code. Raises :class:`UsageError` for a malformed one.

    Not ``app()``, which swallows Ctrl-C: the exception passes through here.
    """
    command = typer.main.get_command(app)
    help_page.complete_help(command)
    try:
        if _COMPLETION in os.environ:  # a shell asks, by the function that --install-completion gave it
            command._main_shell_completion({}, "mla-tune", _COMPLETION)
        with command.make_context("mla-tune", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except SystemExit as end:  # typer's completion ends so
        return end.code if isinstance(end.code, int) else 0
    except _UsageProblem as problem:
        path = problem.ctx.command_path if problem.ctx else "mla-tune"
        text = described(problem)
        if "\n" in text:  # a group without its command: the message is the whole help
            print(text)
            text = "a command is missing"
        raise UsageError(f"{text}; see '{path} --help'") from None
    return 0


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Measured kernel choices for DeepSeek-V4 and V3.2 prefill: sweep a GPU, fit the crossovers, serve a policy."""
