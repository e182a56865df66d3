"""Lossless speculative decoding with a drafter that learns online. `docs/api.md` describes the names below."""

from importlib import import_module

__version__ = "0.1.0"

# Type checkers read this as true, like `typing.TYPE_CHECKING`. At run time a name is imported when it is first used:
# importing torch and transformers takes seconds, and `--help` must not wait for them.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from onlinespec.config import GenerationParams, SamplingParams
    from onlinespec.core import DecodeStats, Draft, DrafterWeights, Features, Feedback, RequestInfo, Verdict
    from onlinespec.drafters.contract import Drafter
    from onlinespec.drafters.loading import load_drafter
    from onlinespec.drafters.settings import Tuning
    from onlinespec.engine.request import ContextOverflow, Request, UnfitPrompt, UnknownToken
    from onlinespec.engine.step import DecodeLoop
    from onlinespec.experiments.compare import Comparing
    from onlinespec.experiments.settings import Comparison
    from onlinespec.learners import Learner, make_learner
    from onlinespec.learning.learner_spec import parse_learner
    from onlinespec.learning.settings import LearnConfig
    from onlinespec.learning.update import InlineLearning
    from onlinespec.models.loading import Target, load_target
    from onlinespec.offline.distill import Distilling
    from onlinespec.offline.replay_stream import Recorded, Replaying, record
    from onlinespec.offline.settings import Distillation
    from onlinespec.registry import DRAFTERS, LEARNERS, LOSSES, PRESETS, WORKLOADS
    from onlinespec.workloads import load_workload

_MODULES = {
    "experiments.compare": ("Comparing",),
    "experiments.settings": ("Comparison",),
    "config": ("GenerationParams", "SamplingParams"),
    "core": ("DecodeStats", "Draft", "DrafterWeights", "Features", "Feedback", "RequestInfo", "Verdict"),
    "engine.request": ("ContextOverflow", "Request", "UnfitPrompt", "UnknownToken"),
    "engine.step": ("DecodeLoop",),
    "offline.distill": ("Distilling",),
    "offline.settings": ("Distillation",),
    "drafters.loading": ("load_drafter",),
    "drafters.contract": ("Drafter",),
    "drafters.settings": ("Tuning",),
    "learning.settings": ("LearnConfig",),
    "learning.update": ("InlineLearning",),
    "learners": ("Learner", "make_learner"),
    "learning.learner_spec": ("parse_learner",),
    "models.loading": ("Target", "load_target"),
    "offline.replay_stream": ("Recorded", "Replaying", "record"),
    "registry": ("DRAFTERS", "LEARNERS", "LOSSES", "PRESETS", "WORKLOADS"),
    "workloads": ("load_workload",),
}

__all__ = [
    "DRAFTERS",
    "LEARNERS",
    "LOSSES",
    "PRESETS",
    "WORKLOADS",
    "Comparing",
    "Comparison",
    "ContextOverflow",
    "DecodeLoop",
    "DecodeStats",
    "Distillation",
    "Distilling",
    "Draft",
    "Drafter",
    "DrafterWeights",
    "Features",
    "Feedback",
    "GenerationParams",
    "InlineLearning",
    "LearnConfig",
    "Learner",
    "Recorded",
    "Replaying",
    "Request",
    "RequestInfo",
    "SamplingParams",
    "Target",
    "Tuning",
    "UnfitPrompt",
    "UnknownToken",
    "Verdict",
    "load_drafter",
    "load_target",
    "load_workload",
    "make_learner",
    "parse_learner",
    "record",
]


if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> object:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"onlinespec.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
