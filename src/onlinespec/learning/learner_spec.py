"""Learner specs: a learner and its settings in one line of text, as on the command line.

    online_gradient
    online_gradient/step_size=3e-4/replay_every=0
    ensemble/step_size_pool=3e-4:1e-3:3e-3/with_frozen=true
    osd

`--learners` takes a list of such lines, so that one comparison can have several settings of a learner.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from onlinespec.core import Params
from onlinespec.learners import Learner, make_learner
from onlinespec.learners.step_sizes import step_size_for
from onlinespec.learning.settings import LearnConfig
from onlinespec.registry import GEOMETRIES, LEARNER_NAMES, LEARNERS, NONE, PRESETS, resolve

_CROSS_ENTROPIES = ("auto", "soft_cross_entropy", "cross_entropy", "mix")
_FULL_LOSS = 4.0  # nats, summed over drafting depths

_SHARED = ("step_size", "geometry", "clip_norm")
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def parse_learner(method: str, defaults: LearnConfig | None = None) -> LearnConfig:
    """Parses a learner spec. Settings that it does not name are taken from `defaults`.

    >>> parse_learner("optimistic/step_size=3e-4/hint_decay=0.5").options
    {'hint_decay': 0.5}

    Raises:
        ValueError: for an unknown name or a value out of range.
    """
    name, *settings = method.split("/")
    config = defaults or LearnConfig()
    if name in PRESETS:
        config = parse_learner(PRESETS[name], config)
    elif name != config.learner:
        config = replace(config, learner=name, options={})
    shared = {key: kind for key, kind in get_type_hints(LearnConfig).items() if key not in ("learner", "options")}
    own = {key: kind for key, kind in _parameters(_factory(config.learner)).items() if key not in _SHARED}
    given: dict[str, Any] = {}  # checked together: either end of a range may be named first
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in shared | own:
            known = ", ".join(sorted(shared | own))
            raise ValueError(
                f'"{setting}" in "{method}" is no setting of {config.learner}; known, as NAME=VALUE: {known}'
            )
        given[key] = _converted(text, (shared | own)[key], setting)
    options = {**config.options, **{key: value for key, value in given.items() if key in own}}
    return replace(config, **{key: value for key, value in given.items() if key in shared}, options=options)


def learner_of(config: LearnConfig, params: Params | None = None) -> Learner:
    """Makes the learner of a config.

    Args:
        params: The weights that learn; their number decides the step size if the config leaves it open. None only
        checks
            the config.

    Raises:
        ValueError: for a value out of range.
    """
    make_geometry = resolve(GEOMETRIES, config.geometry, "geometry")
    has_length = "full_loss" in inspect.signature(make_geometry).parameters
    geometry = make_geometry(full_loss=full_loss_of(config)) if has_length else make_geometry()
    step_size = step_size_for(params or {}) if config.step_size is None else config.step_size
    return make_learner(config.learner, step_size, geometry, config.clip_norm, **config.options)


def full_loss_of(config: LearnConfig) -> float:
    """Returns the loss below which steps shorten and rounds become rarer; 0 for never. See `LearnConfig.full_loss`."""
    if config.full_loss is not None:
        return config.full_loss
    return _FULL_LOSS if config.loss in _CROSS_ENTROPIES else 0.0


def _factory(name: str) -> Any:
    """The class of a learner, by name."""
    if name not in LEARNERS and ":" not in name:
        if name == NONE:
            raise ValueError(f'"{NONE}" is plain decoding, with nothing that learns; decode without a drafter for it')
        known = ", ".join(LEARNER_NAMES)
        raise ValueError(f'unknown learner "{name}"; known: {known}; or give "pkg.module:Class"')
    return resolve(LEARNERS, name, "learner")


def _parameters(factory: Any) -> dict[str, Any]:
    """Names and types of a learner's settings."""
    if is_dataclass(factory):
        hints = get_type_hints(factory)  # resolves each base class in its own module
        return {field.name: hints[field.name] for field in fields(factory) if field.init}
    function = factory.__init__ if inspect.isclass(factory) else factory
    return {name: kind for name, kind in get_type_hints(function).items() if name != "return"}


def _converted(text: str, kind: Any, setting: str) -> Any:
    is_list = get_origin(kind) is tuple
    parts: Any = text.split(":") if is_list else text
    try:
        return msgspec.convert(parts, kind, strict=False)
    except msgspec.ValidationError as error:
        one = next((words for of, words in _IN_WORDS.items() if of in (kind, *get_args(kind))), str(error))
        wanted = f"{one}, or several joined by ':'" if is_list else one
        raise ValueError(f'{setting}: "{text}" is not {wanted}') from error
