"""From argv to an exit status: parses, refuses, runs, and turns errors into messages."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial

import tyro
from rich.logging import RichHandler
from tyro.conf import FlagCreatePairsOff

from onlinespec import __version__
from onlinespec.cli.commands import COMMANDS, Command, Compare, Demo, Distill, Generate, Inspect, Serve, check
from onlinespec.cli.terminal import complain, err


def main() -> None:
    """Exit status 0, 1 for a failed check, 2 for a mistake in what was asked, 70 for a bug of ours, 130 for Ctrl-C."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its warnings speak of ways it is not used here
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding does not
    is_debugging = False
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="onlinespec",
            description=f"Speculative decoding whose drafter learns while it serves. Version {__version__}.",
            config=(FlagCreatePairsOff,),
        )
        is_debugging = command.debug if isinstance(command, Inspect) else command.machine.debug
        check(command)
        sys.exit(_find(command)())
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        sys.exit(1)
    except (ValueError, OSError, ImportError, TypeError, FloatingPointError, MemoryError, RuntimeError) as error:
        if is_debugging:
            traceback.print_exc()
        complain(str(error) or type(error).__name__)
        sys.exit(2)
    except Exception as error:  # nothing of ours raises these on purpose
        if is_debugging:
            traceback.print_exc()
        complain(
            f"this is a bug of onlinespec ({type(error).__name__}: {error}); run the same command with --debug, and "
            "report what it shows"
        )
        sys.exit(70)


def _find(command: Command) -> Callable[[], int]:
    """What runs a command. Importing it takes seconds, most of them torch's and transformers'."""
    match command:
        case Inspect():
            from onlinespec.cli.inspect import inspect

            return partial(inspect, command)
        case Generate():
            from onlinespec.cli.generate import generate

            return partial(generate, command)
        case Compare():
            from onlinespec.cli.compare import compare

            return partial(compare, command)
        case Distill():
            from onlinespec.cli.distill import distill

            return partial(distill, command)
        case Serve():
            from onlinespec.cli.serve import serve

            return partial(serve, command)
        case Demo():
            from onlinespec.cli.compare import compare, demo_comparison

            return lambda: compare(demo_comparison(command))
