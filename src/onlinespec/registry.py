"""Tables of names: drafters, learners, losses, geometries, acceptance rules, workloads, and the shipped models.

A name stands for "package.module:Class", which is imported when it is needed, so that the command line can list all
names without importing torch. A new variant is one file and one line here.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

NONE, FROZEN = "none", "frozen"  # the controls: plain decoding, and a drafter that does not learn

LEARNERS = {
    FROZEN: "onlinespec.learners.frozen:Frozen",
    "online_gradient": "onlinespec.learners.online_gradient:OnlineGradient",
    "optimistic": "onlinespec.learners.optimistic:OptimisticGradient",
    "ensemble": "onlinespec.learners.ensemble:Ensemble",
    "surrogate_ensemble": "onlinespec.learners.ensemble:SurrogateEnsemble",
    "momentum": "onlinespec.learners.momentum:Momentum",
    "reset_to_merged": "onlinespec.learners.reset_to_merged:ResetToMerged",
}

DRAFTERS = {
    "ngram": "onlinespec.drafters.ngram:Ngram",
    "eagle": "onlinespec.drafters.eagle:Eagle",
    "small_lm": "onlinespec.drafters.small_lm.drafter:SmallLM",
}

LOSSES = {
    "auto": "onlinespec.learners.losses:auto",
    "soft_cross_entropy": "onlinespec.learners.losses:soft_cross_entropy",
    "cross_entropy": "onlinespec.learners.losses:cross_entropy",
    "mix": "onlinespec.learners.losses:mix",
    "reverse_kl": "onlinespec.learners.losses:reverse_kl",
    "jsd": "onlinespec.learners.losses:jsd",
    "total_variation": "onlinespec.learners.losses:total_variation",
}

GEOMETRIES = {
    "diagonal": "onlinespec.learners.geometry:Diagonal",
    "euclidean": "onlinespec.learners.geometry:Euclidean",
    "preconditioned": "onlinespec.learners.geometry:Preconditioned",
}

ACCEPTANCE = {  # rules that decide which drafted tokens are kept
    "coupled": "onlinespec.lossless.verify:Coupled",
    "rejection": "onlinespec.lossless.rejection:Rejection",
}

WORKLOADS = {
    "prose": "onlinespec.workloads.builtin:Prose",
    "code": "onlinespec.workloads.builtin:Code",
    "sql": "onlinespec.workloads.builtin:Sql",
    "arithmetic": "onlinespec.workloads.builtin:Arithmetic",
}

_SHIPPED = Path(__file__).parent / "demo"
SHIPPED_TARGETS = {"demo": _SHIPPED / "target"}
SHIPPED_DRAFTERS = {"demo": _SHIPPED / "drafter", "demo/small_lm": _SHIPPED / "small_lm"}

# Names of learner specs; see `parse_learner`.
PRESETS = {
    # Online Speculative Decoding, arXiv:2310.07177: one Adam step per eight requests, on rejected positions, used once.
    "osd": "online_gradient/step_size=1e-4/geometry=diagonal/clip_norm=inf/full_loss=0/rows=rejected"
    "/requests_per_round=8/max_rows=1000000/loss=soft_cross_entropy/replay_every=0/budget=inf",
}

LEARNER_NAMES = (NONE, *LEARNERS, *PRESETS)  # what a command takes as a learner


def resolve(table: Mapping[str, str], name: str, kind: str) -> Any:
    """Imports and returns what a name of the table stands for, or what "pkg.module:Class" names outside of it.

    Args:
        kind: What the table holds ("learner", "workload"), for error messages.

    Raises:
        ValueError: if the name is neither in the table nor an importable "pkg.module:Class".
    """
    path = table.get(name, name)
    if ":" not in path:
        known = ", ".join(sorted(table))
        raise ValueError(f'unknown {kind} "{name}"; known: {known}; or give "pkg.module:Class"')
    module_name, _, attribute = path.partition(":")
    if not module_name.strip(".") or not attribute:
        raise ValueError(f'{kind} "{name}" is not of the form "pkg.module:Class"')
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its own imports fails
        raise ValueError(
            f'{kind} "{name}": no module named {error.name!r}; install it, or add its folder to PYTHONPATH'
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(f'{kind} "{name}": module {module_name!r} has no {attribute!r}')
    return getattr(module, attribute)
