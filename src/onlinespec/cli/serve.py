"""The command `onlinespec serve`: serves a target and a drafter over HTTP until it is stopped."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from onlinespec.cli.checks import check_save, checked_learner, load, save, use
from onlinespec.cli.commands import Serve
from onlinespec.cli.terminal import err
from onlinespec.control.chooser import Controller
from onlinespec.core import DrafterWeights
from onlinespec.drafters.contract import Drafter
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.prefix_cache import PrefixCache
from onlinespec.engine.profile import measure_step_costs
from onlinespec.engine.scheduler import Scheduler
from onlinespec.engine.settings import Limits
from onlinespec.engine.step import DecodeLoop, Learning
from onlinespec.learning.footprint import MemoryBeside
from onlinespec.learning.settings import LearnConfig
from onlinespec.learning.update import InlineLearning
from onlinespec.models.loading import Target
from onlinespec.publishing.learning_process import ProcessLearning
from onlinespec.publishing.store import Versions
from onlinespec.publishing.workers import ThreadLearning, TrainerSpec
from onlinespec.registry import FROZEN, NONE

try:
    from onlinespec.server.app import create_app
    from onlinespec.server.engine import Engine
    from onlinespec.server.run import listening, run
    from onlinespec.server.settings import ServerSettings
except ModuleNotFoundError as error:
    needed = ("fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "prometheus_client")
    if error.name not in needed:
        raise
    raise ImportError(
        f'serving needs the package {error.name}; install it with: pip install "onlinespec[server]"'
    ) from error

_KEY_VARIABLE = "ONLINESPEC_API_KEY"


def serve(command: Serve) -> int:
    """Checks the settings, binds the address, loads, serves, and saves the drafter.

    The address is bound before the models are loaded, so that a port in use is reported at once.

    Returns:
        The exit status.

    Raises:
        ValueError, OSError: for settings that can't work, or an address in use.
        KeyboardInterrupt: if Ctrl-C stopped the server, after everything was saved.
    """
    use(command.machine)
    config = checked_learner(command.learner or LearnConfig.learner, command.learning)
    check_save(command.save, config)
    if config is None and command.versions:
        raise ValueError(f"plain decoding has no drafter to keep versions of; leave out --versions {command.versions}")
    limits = command.limits.settings
    _settings(command)
    if command.reset_drafter and not command.versions:
        raise ValueError("--reset-drafter moves the versions in --versions DIR aside; give that, too")
    with listening(command.host, command.port) as listener, _versions(command, config) as versions:
        target = load(command.target, command.machine, _beside(command, config))
        drafter = _drafter(command, target) if config else None
        config = _learner(command, config, drafter)
        if versions and drafter and drafter.is_trainable:
            _resume(command, versions, target, drafter)
        start, is_ours = drafter.weights.version if drafter else 0, target.path == "own"
        limits = limits if is_ours else _one_by_one(limits)
        prefixes = PrefixCache(int(command.prefix_megabytes * 1e6)) if command.prefix_megabytes and is_ours else None
        control = None if command.fixed_draft_length else _control(command, target, drafter, limits)
        settings, facts = _settings(command, target), _facts(command, config, target)
        if versions and _place(command, config, target) in ("thread", "process"):
            versions.close()  # releases the lock: the learning thread or process takes it over
        with _learning(command, config, target, drafter) as learning:
            engine = Engine(Scheduler(DecodeLoop(target, drafter, learning, prefixes), limits, control))
            greet = partial(_print_banner, command, settings, target, facts, listener)
            stopped_by = run(create_app(engine, settings, facts), engine, listener, settings.grace_seconds, greet)
    if command.save and drafter:
        whose = f"drafter (weights version {drafter.weights.version})"
        save(drafter, command.save, drafter.weights.version > start, whose)
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    err.print("stopped")
    return 0


@contextmanager
def _versions(command: Serve, config: LearnConfig | None) -> Iterator[Versions | None]:
    """Gives the version folder, locked if versions will be written to it. None without --versions.

    Raises:
        ValueError: if the folder can't be written to; this is checked before anything is loaded.
    """
    folder = command.versions
    if folder is None:
        yield None
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--versions {folder} is a file; give a directory")
    with Versions(folder) as versions:
        if command.reset_drafter or (config and config.learner != FROZEN):
            try:
                versions.hold()
            except OSError as error:
                raise ValueError(
                    f"no versions can be kept in {folder} ({error.strerror}); choose another --versions"
                ) from error
        yield versions


def _resume(command: Serve, versions: Versions, target: Target, drafter: Drafter) -> None:
    """Puts the newest good version into the drafter, or leaves the drafter as --drafter gave it."""
    folder = versions.folder
    if command.reset_drafter and (aside := versions.reset()):
        err.print(f"the versions in {folder} are kept in {aside.name}", highlight=False, soft_wrap=True)
    if found := versions.latest_good(target.fingerprint):
        versions.resume(found, drafter, found.learner)  # learning itself reports a change of the learner
        err.print(f"going on with version {found.version} of {folder}", highlight=False, soft_wrap=True)
        return
    if versions.numbers():
        told = f"none of the versions in {folder} can be served: beginning anew with {command.drafter_name}"
        err.print(told, highlight=False, soft_wrap=True)
    if (number := versions.next_version) > drafter.weights.version:  # version numbers are not reused
        drafter.swap(DrafterWeights(drafter.weights.params, number))


def _drafter(command: Serve, target: Target) -> Drafter:
    return load_drafter(command.drafter_name, target, command.machine.seed, command.learning.tuning())


def _control(command: Serve, target: Target, drafter: Drafter | None, limits: Limits) -> Controller | None:
    """Measures what decode steps cost here and returns the controller that chooses how many tokens to draft."""
    most = command.decoding.num_draft_tokens
    if not (most and drafter):
        return None
    with err.status("measuring what steps cost"):
        sampling = command.defaults(target.sampling).sampling
        max_bytes = limits.cache_megabytes * 1e6
        costs = measure_step_costs(target, drafter, limits.max_running, most, sampling, max_bytes)
    return Controller(costs, most, command.learning.learn_budget)


@contextmanager
def _learning(
    command: Serve, config: LearnConfig | None, target: Target, drafter: Drafter | None
) -> Iterator[Learning | None]:
    """Starts learning in the place that was asked for, and stops it at the end of the block."""
    place = _place(command, config, target)
    if not (place and config and drafter):
        yield None
        return
    if place == "inline":
        yield InlineLearning(drafter, config=config, seed=command.machine.seed)
        return
    spec = TrainerSpec(
        drafter=command.drafter_name,
        learner=command.learner or LearnConfig.learner,
        config=config,
        seed=command.machine.seed,
        tuning=command.learning.tuning(),
        share=command.learning.learn_budget,
        versions=str(command.versions.absolute()) if command.versions else "",
    )
    learning = (ProcessLearning if place == "process" else ThreadLearning)(target, spec, drafter.weights, drafter.swap)
    learning.start()
    try:
        yield learning
    finally:
        learning.stop()


def _beside(command: Serve, config: LearnConfig | None) -> MemoryBeside:
    """What needs memory beside the target, estimated from the settings: the target is not loaded yet."""
    if config is None:
        return MemoryBeside(None, [])
    is_learning = config.learner != FROZEN and command.decoding.num_draft_tokens > 0
    place = command.learn_in or ("process" if torch.device(command.machine.device).type == "cpu" else "thread")
    return MemoryBeside(command.drafter_name, [config] * is_learning, "" if place == "inline" else place)


def _place(command: Serve, config: LearnConfig | None, target: Target) -> str:
    """Where learning runs: "process", "thread" or "inline"; empty if nothing is learned."""
    if config is None or config.learner == FROZEN or not command.decoding.num_draft_tokens:
        return ""
    if command.learn_in:
        return command.learn_in
    is_apart = target.decoder.device.type == "cpu" and target.decoder.has_plain_head
    return "process" if is_apart else "thread"


def _facts(command: Serve, config: LearnConfig | None, target: Target) -> dict[str, Any]:
    """What the live page shows about the server; see `create_app`."""
    place = _place(command, config, target)
    where = {"inline": "between steps", "thread": "in a thread", "process": "in a process of its own"}
    return {
        "drafter": command.drafter_name if config else NONE,
        "learning_mode": f"learns {where[place]} ({config.learner})" if place and config else "does not learn",
        "has_chat": bool(target.tokenizer.chat_template),
    }


def _one_by_one(limits: Limits) -> Limits:
    """Limits for targets that run through transformers, whose cache holds one request at a time."""
    return replace(limits, max_running=1)


def _settings(command: Serve, target: Target | None = None) -> ServerSettings:
    """Returns the server's settings. Without a target, they serve only to check the command's settings."""
    return ServerSettings(
        model=command.target if command.served_model_name is None else command.served_model_name,
        defaults=command.defaults(target.sampling) if target else command.defaults(),
        api_key=command.api_key if command.api_key is not None else os.environ.get(_KEY_VARIABLE) or None,
        max_body_bytes=int(command.max_body_megabytes * 1e6),
        max_prompt_tokens=command.max_prompt_tokens,
        grace_seconds=command.grace_seconds,
    )


def _learner(command: Serve, config: LearnConfig | None, drafter: Drafter | None) -> LearnConfig | None:
    """Returns the learner's settings; `frozen` if none was named and the drafter can't learn.

    Raises:
        ValueError: if a learner was named and the drafter can't learn.
    """
    if not (config and drafter) or drafter.is_trainable or config.learner == FROZEN:
        return config
    if command.learner is not None:
        raise ValueError(f"drafter {command.drafter_name} does not learn; leave out --learner {command.learner}")
    return checked_learner(FROZEN, command.learning)


def _drafting(facts: dict[str, Any]) -> str:
    return "plain decoding" if facts["drafter"] == NONE else f"drafter {facts['drafter']} {facts['learning_mode']}"


def _print_banner(
    command: Serve, settings: ServerSettings, target: Target, facts: dict[str, Any], listener: socket.socket
) -> None:
    """Prints what is served, at which URL, warnings, and a curl command to try."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    lines = [f"serving {settings.model} at {url}; {_drafting(facts)}"]
    if target.path != "own":
        lines.append("this model runs through transformers: one request at a time, no shared prompts")
    if settings.api_key is None and not ipaddress.ip_address(host).is_loopback:
        lines.append(f"warning: anyone who reaches {url} may ask: no --api-key is set")
    has_chat = bool(target.tokenizer.chat_template)
    path = "chat/completions" if has_chat else "completions"
    text = "Write a short paragraph about a baker."  # a prompt that the demo's small model can answer
    asked = {"messages": [{"role": "user", "content": text}]} if has_chat else {"prompt": text}
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key else ""
    lines.append(f"try: curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(asked)}'")
    for line in lines:
        err.print(line, highlight=False, soft_wrap=True, markup=False)
