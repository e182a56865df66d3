"""Checks that commands make before the work starts, and functions to load a target and save a drafter."""

from __future__ import annotations

from pathlib import Path

import torch

from onlinespec.cli.arguments import Learning, Machine
from onlinespec.cli.terminal import err
from onlinespec.drafters.checkpoints import SIDE_FILE
from onlinespec.drafters.contract import Drafter
from onlinespec.experiments.results_folder import why_not_writable
from onlinespec.learning.footprint import MemoryBeside
from onlinespec.learning.learner_spec import learner_of, parse_learner
from onlinespec.learning.settings import LearnConfig
from onlinespec.models.loading import Target, as_device, as_dtype, load_target
from onlinespec.registry import LEARNER_NAMES, LOSSES, NONE, resolve


def use(machine: Machine) -> None:
    """Checks that the device and the data type exist, and sets torch's number of threads.

    Raises:
        ValueError: if they do not.
    """
    as_device(machine.device)
    as_dtype(machine.dtype)
    torch.set_num_threads(machine.num_threads)


def load(name: str, machine: Machine, beside: MemoryBeside) -> Target:
    """Loads the target, with a spinner on standard error.

    Args:
        beside: The drafter and learning that must fit into memory beside it.
    """
    with err.status(f"loading {name}"):
        return load_target(name, machine.device, machine.dtype, beside=beside)


def checked_learner(line: str, learning: Learning) -> LearnConfig | None:
    """Parses a learner's spec (NAME/SETTING=VALUE/...) and checks its learner and loss.

    Returns:
        The settings; None for plain decoding.

    Raises:
        ValueError: for an unknown name or setting.
    """
    name, slash, settings = line.partition("/")
    if name == NONE:
        if slash:
            raise ValueError(f'"{name}" in "{line}" takes no settings; leave "{slash}{settings}" out')
        return None
    if "=" in name:
        raise ValueError(f'"{name}" is a setting without a learner; write LEARNER/{line}')
    if name not in LEARNER_NAMES and ":" not in name:
        known = ", ".join(LEARNER_NAMES)
        raise ValueError(f'unknown learner "{name}"; known: {known}; or give "pkg.module:Class"')
    config = parse_learner(line, learning.config())
    learner_of(config)
    resolve(LOSSES, config.loss, "loss")
    return config


def check_save(folder: Path | None, config: LearnConfig | None) -> None:
    """Checks that a drafter can be saved to a folder, before the work that it would hold.

    Args:
        config: The learner's settings; None for plain decoding, which has no drafter.

    Raises:
        ValueError: if there is no drafter, the folder holds something else, or it can't be written.
    """
    if folder is None:
        return
    if config is None:
        raise ValueError(f"plain decoding has no drafter to save; leave out --save {folder}, or name another learner")
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_taken and not (folder / SIDE_FILE).is_file():
        raise ValueError(f"--save {folder} holds something that is no drafter of ours; choose another place")
    check_parent(folder, "--save")


def save(drafter: Drafter, folder: Path, has_learned: bool, whose: str) -> None:
    """Saves a drafter and prints where; a drafter that learned nothing does not overwrite a saved one.

    Args:
        whose: How to call the drafter in the message.
    """
    if (folder / SIDE_FILE).is_file() and not has_learned:
        err.print(f"nothing was learned, so {folder} stays as it is", highlight=False, soft_wrap=True)
        return
    drafter.save(folder.absolute())
    err.print(f"{whose} saved to {folder}", highlight=False, soft_wrap=True)


def check_parent(folder: Path, flag: str) -> None:
    """Raises ValueError, naming the flag, if the folder could not be created."""
    if reason := why_not_writable(folder.absolute().parent):
        raise ValueError(f"the drafter can't be saved to {folder}: {reason}; choose another {flag}")
