"""The command ``laminar``: the commands by name, and what becomes of errors.

Importing this file loads Typer and little else, so that ``laminar --help`` answers at once; each
command imports what it needs.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from laminar._errors import LaminarError
from laminar.cli import anomalies, fitting, looking, posterior, report, using
from laminar.cli.common import fail


class Group(TyperGroup):
    """Commands whose foreseen errors are one line on standard error and exit status 2."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run a command line; anything unforeseen keeps its traceback."""
        words = list(sys.argv[1:] if args is None else args)
        standalone = options.pop("standalone_mode", True)
        try:
            code = super().main(words, *rest, standalone_mode=False, **options)
        except typer.TyperException as error:
            if words:
                code = fail(error.format_message(), as_json="--json" in words)
            else:
                print(error.format_message())  # the help
                code = 0
        except LaminarError as error:
            code = fail(str(error), as_json="--json" in words)
        except MemoryError:
            code = fail("There is not enough memory for this.", as_json="--json" in words)
        except typer.Abort:
            code = 130
        if not standalone:
            return code
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=Group,
    name="laminar",
    help="Normalizing flows with exact densities: tables and posteriors.",
    epilog="TABLE is a CSV, TSV, Parquet, Arrow, Feather, NPY or NPZ file, or builtin:NAME "
    "(see laminar data).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None if not sys.stdout.isatty() else "rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(shown: bool) -> None:
    if shown:
        from laminar._version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(fitting.fit)
app.command()(using.score)
app.command()(using.sample)
app.command()(using.check)
app.command()(anomalies.detect)
app.command()(anomalies.drift)
app.command()(anomalies.impute)
app.command()(fitting.compare)
app.command()(looking.info)
app.command()(looking.data)
app.command()(looking.export)
app.command()(report.report)
app.command()(report.plot)
app.command()(posterior.posterior)


def run() -> None:
    """Run the command line of this process."""
    app()
