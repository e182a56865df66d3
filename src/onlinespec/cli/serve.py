"""`onlinespec serve`: a target and a drafter behind HTTP, until someone stops it."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
from functools import partial

from onlinespec.cli.arguments import Serve
from onlinespec.cli.checks import check_save, checked_learner, load, save, use
from onlinespec.cli.terminal import err
from onlinespec.compare import FROZEN
from onlinespec.config import LearnConfig
from onlinespec.decode import DecodeLoop
from onlinespec.drafters import load_drafter
from onlinespec.drafters.base import Drafter
from onlinespec.learn import InlineLearning
from onlinespec.models.loading import Target
from onlinespec.models.prefix_cache import PrefixCache
from onlinespec.scheduler import Limits, Scheduler

try:
    from onlinespec.server.app import create_app
    from onlinespec.server.engine import Engine
    from onlinespec.server.run import listening, run
    from onlinespec.server.settings import ServerSettings
except ModuleNotFoundError as error:
    if error.name not in ("fastapi", "starlette", "pydantic", "pydantic_core", "uvicorn", "prometheus_client"):
        raise
    raise ImportError(
        f'serving needs the package {error.name}; install it with: pip install "onlinespec[server]"'
    ) from error

_DEFAULT_LEARNER = "optimistic"
_KEY_VARIABLE = "ONLINESPEC_API_KEY"


def serve(command: Serve) -> int:
    """Refuses what would fail later, takes the address, loads, serves, saves."""
    use(command.machine)
    config = checked_learner(command.learner or _DEFAULT_LEARNER, command.learning)
    check_save(command.save)
    limits = _limits(command)
    _settings(command)
    with listening(command.host, command.port) as door:
        target = load(command.target, command.machine)
        drafter = load_drafter(command.drafter_name, target, command.machine.seed, command.learning.tuning())
        learning = InlineLearning(drafter, config=_learner(command, config, drafter), seed=command.machine.seed)
        is_ours = target.path == "own"
        prefixes = PrefixCache(int(command.prefix_megabytes * 1e6)) if command.prefix_megabytes and is_ours else None
        loop = DecodeLoop(target, drafter, learning, prefixes)
        engine = Engine(Scheduler(loop, limits if is_ours else _one_by_one(limits)))
        settings = _settings(command, target)
        greet = partial(_greet, command, settings, target, learning, door)
        stopped_by = run(create_app(engine, settings), engine, door, settings.grace_seconds, greet)
    if command.save:
        whose = f"drafter (weights version {drafter.weights.version})"
        save(drafter, command.save, learning.num_rounds > 0, whose)
    if stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


def _limits(command: Serve) -> Limits:
    return Limits(command.max_running, command.max_waiting, command.cache_megabytes)


def _one_by_one(limits: Limits) -> Limits:
    """For targets that run through transformers, whose cache holds one request at a time."""
    return Limits(1, limits.max_waiting, limits.cache_megabytes)


def _settings(command: Serve, target: Target | None = None) -> ServerSettings:
    """As the app takes them; without a target only to see whether they are fine."""
    return ServerSettings(
        model=command.target if command.served_model_name is None else command.served_model_name,
        defaults=command.defaults(target.sampling) if target else command.defaults(),
        api_key=command.api_key if command.api_key is not None else os.environ.get(_KEY_VARIABLE) or None,
        max_body_bytes=int(command.max_body_megabytes * 1e6),
        max_prompt_tokens=command.max_prompt_tokens,
        grace_seconds=command.grace_seconds,
    )


def _learner(command: Serve, config: LearnConfig, drafter: Drafter) -> LearnConfig:
    """What was asked for, or what the drafter can do."""
    if drafter.is_trainable or config.learner == FROZEN:
        return config
    if command.learner is not None:
        raise ValueError(f"drafter {command.drafter_name} does not learn; leave out --learner {command.learner}")
    return checked_learner(FROZEN, command.learning)


def _greet(
    command: Serve, settings: ServerSettings, target: Target, learning: InlineLearning, door: socket.socket
) -> None:
    """What is served, where, and how to ask."""
    host, port = door.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    how = (
        "does not learn"
        if learning.is_frozen or learning.config.learner == FROZEN
        else f"learns ({learning.config.learner})"
    )
    lines = [f"serving {settings.model} at {url}; drafter {command.drafter_name} {how}"]
    if target.path != "own":
        lines.append("this model runs through transformers: one request at a time, no shared prompts")
    if settings.api_key is None and not ipaddress.ip_address(host).is_loopback:
        lines.append(f"warning: anyone who reaches {url} may ask: no --api-key is set")
    has_chat = bool(target.tokenizer.chat_template)
    path = "chat/completions" if has_chat else "completions"
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if has_chat else {"prompt": "Hello"}
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key else ""
    lines.append(f"try: curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(asked)}'")
    for line in lines:
        err.print(line, highlight=False, soft_wrap=True, markup=False)
