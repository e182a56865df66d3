"""Which flags there are, command by command: one that goes or changes its name is seen here."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import tyro
from tyro.conf import FlagCreatePairsOff

from onlinespec.cli.commands import COMMANDS

MACHINE = "device dtype num-threads seed debug"
DECODING = "num-draft-tokens max-new-tokens top-k top-p min-p repetition-penalty"
LEARNING = (
    "step-size geometry loss learn-budget learn-costs tune adapter-rank replay-every replay-megabytes replay-minutes "
    "min-interval max-interval"
)
FLAGS = {
    "demo": f"num-requests minutes out temperature save {DECODING} {LEARNING} {MACHINE}",
    "generate": f"prompt drafter learner temperature stop raw save {DECODING} {LEARNING} {MACHINE}",
    "compare": "data drafter learners out num-requests minutes temperature acceptance repeats window telemetry save "
    f"{DECODING} {LEARNING} {MACHINE}",
    "distill": "data out drafter num-requests temperature max-new-tokens num-draft-tokens holdout epochs patience "
    f"batch-requests step-size minutes loss tune adapter-rank restart keep-text {MACHINE}",
    "serve": "drafter learner host port api-key served-model-name temperature max-running max-waiting cache-megabytes "
    "prefill-tokens prefill-alone prefix-megabytes max-body-megabytes max-prompt-tokens grace-seconds "
    f"fixed-draft-length learn-in versions reset-drafter save {DECODING} {LEARNING} {MACHINE}",
    "inspect": "debug",
}


def help_of(command):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        tyro.extras.subcommand_cli_from_dict(COMMANDS, args=[command, "--help"], config=(FlagCreatePairsOff,))
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())


def test_every_command_is_listed_here():
    assert set(FLAGS) == set(COMMANDS)


@pytest.mark.parametrize("command", FLAGS)
def test_a_command_has_these_flags_and_no_others(command):
    found = set(re.findall(r"(?m)^[│ ]*(?:-\w \w+, )?--([a-z][a-z-]*)", help_of(command)))
    assert found - {"help"} == set(FLAGS[command].split())


@pytest.mark.parametrize("command", FLAGS)
def test_every_flag_says_what_it_is_for(command):
    lines = [line.strip("│ ") for line in help_of(command).splitlines()]
    for flag in FLAGS[command].split():
        first = next(i for i, line in enumerate(lines) if re.match(rf"(-\w \w+, )?--{flag}\b(?!-)", line))
        told = " ".join([re.sub(r"^.*?(  |$)", "", lines[first]), lines[first + 1]])
        assert len(told.split()) >= 3, f"--{flag} of {command}: {told}"
