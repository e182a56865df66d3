"""Lossless speculative decoding whose drafter learns online."""

__version__ = "0.1.0"

from onlinespec.compare import Comparing, Comparison
from onlinespec.config import GenerationParams, LearnConfig, SamplingParams
from onlinespec.core import DecodeStats, Draft, DrafterWeights, Feedback, Verdict
from onlinespec.decode import ContextOverflow, DecodeLoop, Request
from onlinespec.drafters import DRAFTERS, load_drafter
from onlinespec.drafters.base import Drafter
from onlinespec.learn import InlineLearning
from onlinespec.learners import LEARNERS, Learner, make_learner
from onlinespec.models.loading import Target, load_target
from onlinespec.workloads import WORKLOADS, load_workload

__all__ = [
    "DRAFTERS",
    "LEARNERS",
    "WORKLOADS",
    "Comparing",
    "Comparison",
    "ContextOverflow",
    "DecodeLoop",
    "DecodeStats",
    "Draft",
    "Drafter",
    "DrafterWeights",
    "Feedback",
    "GenerationParams",
    "InlineLearning",
    "LearnConfig",
    "Learner",
    "Request",
    "SamplingParams",
    "Target",
    "Verdict",
    "load_drafter",
    "load_target",
    "load_workload",
    "make_learner",
]
