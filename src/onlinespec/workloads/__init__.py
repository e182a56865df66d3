"""Workloads: streams of prompts from jsonl files, Hub data sets, and built-in files."""

from typing import cast

from onlinespec.registry import WORKLOADS, resolve
from onlinespec.workloads.base import Prompt, Split, Workload

__all__ = ["Prompt", "Split", "Workload", "load_workload"]


def load_workload(spec: str) -> Workload:
    """Loads the workload that a spec names.

    Args:
        spec: "builtin:sql", "builtin:pkg.module:Class", "path/to/x.jsonl" (or .jsonl.gz), or
            "hf:dataset" with an optional ":split".

    Raises:
        ValueError: for an unknown built-in, or a file that has other content than rows with a prompt.
        FileNotFoundError: if there is no such file.
        ImportError: for "hf:" without the optional `datasets` package.
    """
    scheme, _, rest = spec.partition(":")
    if scheme == "builtin":
        return cast(Workload, resolve(WORKLOADS, rest, "workload")())
    if scheme == "hf":
        from onlinespec.workloads.hub import HubWorkload

        return HubWorkload(rest)
    from onlinespec.workloads.jsonl import JsonlWorkload

    return JsonlWorkload(spec)
