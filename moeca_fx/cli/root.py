"""The typer application: its commands, its version, and the one place where errors become exit codes."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import moeca_fx
from moeca_fx.cli import USAGE_ERROR
from moeca_fx.cli.bench_command import bench
from moeca_fx.cli.console import compiler_lines, plain_warnings, show_error
from moeca_fx.cli.demo_command import demo
from moeca_fx.cli.doctor_command import doctor
from moeca_fx.cli.export_command import export
from moeca_fx.cli.inspect_command import inspect
from moeca_fx.cli.run_command import run
from moeca_fx.cli.sample_command import sample
from moeca_fx.cli.tune_command import tune
from moeca_fx.errors import MoecaError


class ReportingGroup(TyperGroup):
    """Turns every `MoecaError` of a command into one message on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with plain_warnings(), compiler_lines():
            try:
                return super().invoke(ctx)
            except MoecaError as error:
                show_error(error)
                raise typer.Exit(USAGE_ERROR) from error


app = typer.Typer(
    cls=ReportingGroup,
    name="moeca-fx",
    help="Find the experts of a diffusion transformer and cache them across denoising steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(bench)
app.command()(demo)
app.command()(doctor)
app.command()(export)
app.command()(inspect)
app.command()(run)
app.command()(sample)
app.command()(tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moeca-fx {moeca_fx.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Find the experts of a diffusion transformer and cache them across denoising steps."""
