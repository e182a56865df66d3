"""What a target will take of memory, told from its files' headers before any weight is read.

Counts what can't be given back: weights in the dtype asked for, the second layouts that our path keeps, and keys and
values of requests. Pages of the checkpoint's files that are read along are not counted; the system drops them at need.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from onlinespec.models.base import ModelConfig

log = logging.getLogger(__name__)

_GIB = 1 << 30
_SLACK = 1.15  # holes that an allocator leaves between layers: measured 1.04 to 1.18 (161 M parameters)
_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes, and what they are for."""

    num_parameters: int
    loading: int  # the most while it is loaded; less is held afterwards
    cache_per_token: int
    max_positions: int
    dtype: torch.dtype


def estimate(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, dtype: torch.dtype, keeps_second_head: bool = False
) -> Need:
    """What a checkpoint with tensors of these shapes needs.

    Args:
        keeps_second_head: Our path with prepacked products: layers are replaced by their packed form one by one, but
            the head is kept in both, and each step of packing holds a weight and two copies.
    """
    sizes = {name: math.prod(dims) for name, dims in shapes.items()}
    layer, total = config.layer, sum(sizes.values())
    elements = total
    if keeps_second_head:
        head = config.vocab_size * layer.hidden_size
        elements += head + 2 * max(head, 2 * layer.intermediate_size * layer.hidden_size)
    return Need(
        num_parameters=total,
        loading=round(_SLACK * elements * dtype.itemsize),
        cache_per_token=2 * config.num_layers * layer.num_kv_heads * layer.head_dim * dtype.itemsize,
        max_positions=config.max_positions,
        dtype=dtype,
    )


def check_memory(need: Need, device: torch.device, folder: Path) -> None:
    """Refuses what does not fit; warns if a request of the whole context would not.

    Raises:
        ValueError: naming needed and available memory, and the way out.
    """
    available = available_bytes(device)
    if available is None:
        return
    dtype = str(need.dtype).removeprefix("torch.")
    if need.loading > available:
        smaller = "--dtype bfloat16, " if need.dtype.itemsize > 2 else ""
        raise ValueError(
            f"{folder} needs about {need.loading / _GIB:.1f} GiB of memory ({need.num_parameters / 1e6:,.0f} million "
            f"parameters in {dtype}), {available / _GIB:.1f} GiB are available on {device}; "
            f"use {smaller}another --device or a smaller model"
        )
    num_tokens = (available - need.loading) // need.cache_per_token
    if num_tokens < need.max_positions:
        log.warning(
            "memory on %s will do for requests of about %s tokens, not for the whole context of %s",
            device,
            f"{num_tokens:,}",
            f"{need.max_positions:,}",
        )


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be had on a device now; None where that can't be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [size for size in (_available_in_system(), _left_in_group()) if size is not None]
    return min(found, default=None)


def _available_in_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # not Linux: at least what is built in
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _left_in_group(groups: Path = _GROUPS, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the control groups (v2) that this process is in leave it, the tightest of them; None without a limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    path = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), None)
    if path is None:
        return None
    inner = groups / path
    left = [_left_in(folder) for folder in (inner, *inner.parents) if folder == groups or groups in folder.parents]
    return min((size for size in left if size is not None), default=None)


def _left_in(group: Path) -> int | None:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
