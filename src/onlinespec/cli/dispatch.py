"""The main function: parses argv, checks it, runs the command, and turns errors into messages and an exit status."""

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
    """Runs the command in argv and exits the process.

    The status is 0 for success, 1 for a failed check or a closed output pipe, 2 for a user's error, 70 for a bug of
    onlinespec, 130 for Ctrl-C.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its warnings are about uses that do not occur here
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the terminal's encoding may lack characters of an answer
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
    except BrokenPipeError:  # the reader of the pipe has closed it, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at exit
        sys.exit(1)
    except (ValueError, OSError, ImportError, TypeError, FloatingPointError, MemoryError, RuntimeError) as error:
        if is_debugging:
            traceback.print_exc()
        complain(str(error) or type(error).__name__)
        sys.exit(2)
    except Exception as error:  # no code here raises these types on purpose
        if is_debugging:
            traceback.print_exc()
        complain(
            f"this is a bug of onlinespec ({type(error).__name__}: {error}); run the same command with --debug, and "
            "report what it shows"
        )
        sys.exit(70)


def _find(command: Command) -> Callable[[], int]:
    """Imports and returns the function that runs a command. Importing torch and transformers takes seconds."""
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
