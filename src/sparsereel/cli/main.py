"""The typer application and the one place where exceptions become sentences and exit codes."""

from __future__ import annotations

import logging
import os
import sys

import typer

from sparsereel.cli import console
from sparsereel.cli.doctor import doctor
from sparsereel.cli.generate import generate
from sparsereel.cli.inspect import inspect

app = typer.Typer(
    name="sparsereel",
    help="Faster, longer and larger diffusion video and images without training, by sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(generate)
app.command()(inspect)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log every choice that is made."),
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparsereel").setLevel(logging.DEBUG if verbose else logging.WARNING)
    logging.getLogger("sparsereel_kernels").setLevel(logging.DEBUG if verbose else logging.WARNING)
    if version:
        import sparsereel

        print(f"sparsereel {sparsereel.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `sparsereel` command."""
    from sparsereel_kernels import BackendUnavailable

    try:
        app()
    except KeyboardInterrupt:
        console.fail("interrupted; finished files are kept, run the same command again to go on", console.INTERRUPTED)
    except BackendUnavailable as error:
        console.fail(str(error), console.MISSING)
    except ModuleNotFoundError as error:
        console.fail(f"the package {error.name!r} is needed for this command; install it with pip", console.MISSING)
    except ValueError as error:
        console.fail(str(error))
    except MemoryError:
        console.fail("out of memory; a smaller --frames, --height or --width needs less", console.MISSING)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error, but Python would print one at exit.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        console.fail(f"the system refused{name}: {error.strerror or error}")
