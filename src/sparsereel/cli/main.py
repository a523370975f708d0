"""The typer application and the one place where exceptions become sentences and exit codes."""

from __future__ import annotations

import logging
import os
import sys

import typer

from sparsereel.cli import console
from sparsereel.cli.bench import app as bench
from sparsereel.cli.doctor import doctor
from sparsereel.cli.eval import app as evaluate
from sparsereel.cli.extend import extend
from sparsereel.cli.generate import generate
from sparsereel.cli.inspect import inspect
from sparsereel.cli.models import models
from sparsereel.cli.search import search
from sparsereel.cli.stream import stream
from sparsereel.cli.tune import tune
from sparsereel.heap import keep_freed_memory

app = typer.Typer(
    name="sparsereel",
    help="Faster, longer and larger diffusion video and images without training, by sparse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(generate)
app.command()(extend)
app.command()(stream)
app.command()(search)
app.command()(tune)
app.command()(inspect)
app.command()(models)
app.command()(doctor)
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        import sparsereel

        print(f"sparsereel {sparsereel.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log every choice that is made."),
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("sparsereel", "sparsereel_kernels"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.WARNING)


def main() -> None:
    """Entry point of the `sparsereel` command."""
    keep_freed_memory()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code. Every expected failure is one sentence on stderr."""
    from sparsereel_kernels import BackendUnavailable

    command = typer.main.get_command(app)
    try:
        # standalone_mode would end the process itself, and print usage errors in its own way.
        code = command.main(args=arguments, prog_name="sparsereel", standalone_mode=False)
        # typer turns Ctrl-C into this code by itself.
        return _interrupted() if code == console.INTERRUPTED else code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except typer.Exit as stop:
        return stop.exit_code
    except BackendUnavailable as error:
        return console.complain(str(error), console.MISSING)
    except ModuleNotFoundError as error:
        text = f"the package {error.name!r} is needed for this command; install it with pip"
        return console.complain(text, console.MISSING)
    except ValueError as error:
        return console.complain(str(error))
    except MemoryError:
        text = "out of memory; a smaller --frames, --height or --width needs less"
        return console.complain(text, console.MISSING)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error, but Python would print one at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        return console.complain(f"the system refused{name}: {error.strerror or error}")
    except Exception as error:
        if _is_usage_error(error):
            return console.complain(error.format_message())  # type: ignore[attr-defined]
        raise


def _interrupted() -> int:
    text = "interrupted; finished files are kept, run the same command again to go on"
    return console.complain(text, console.INTERRUPTED)


def _is_usage_error(error: Exception) -> bool:
    """Whether the command line itself was wrong: typer carries its own copy of click's exceptions."""
    return hasattr(error, "format_message")
