"""Streams of prompts: jsonl files, Hub data sets, and built-ins that need no download."""

from typing import cast

from onlinespec.registry import WORKLOADS, resolve
from onlinespec.workloads.base import Prompt, Split, Workload

__all__ = ["Prompt", "Split", "Workload", "load_workload"]


def load_workload(spec: str) -> Workload:
    """The workload a user names.

    Args:
        spec: "builtin:sql", "builtin:pkg.module:Class", "path/to/x.jsonl" (or .jsonl.gz), or
            "hf:dataset" with an optional ":split".

    Raises:
        ValueError: an unknown built-in, or a file whose content is not rows with a prompt.
        FileNotFoundError: no such file.
        ImportError: "hf:" without the optional `datasets` package.
    """
    scheme, _, rest = spec.partition(":")
    if scheme == "builtin":
        return cast(Workload, resolve(WORKLOADS, rest, "workload")())
    if scheme == "hf":
        from onlinespec.workloads.hub import HubWorkload

        return HubWorkload(rest)
    from onlinespec.workloads.jsonl import JsonlWorkload

    return JsonlWorkload(spec)
