"""Memory estimates for a target, its drafter and learning, from tensor shapes, before any weight is read.

They count memory that stays allocated: weights in the requested dtype, packed copies of weights, the KV cache. They do
not count cached pages of the checkpoint's files, which the system frees when needed, nor temporary memory of a forward
pass or round, except for packing a weight.
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
from onlinespec.models.linear import HalfLinear, MakeLinear, PlainLinear

log = logging.getLogger(__name__)

_GIB = 1 << 30
_SLACK = 1.15  # factor for fragmentation: measured 1.04 to 1.18 (161 M parameters)
_GROUPS = Path("/sys/fs/cgroup")  # where Linux mounts control groups


@dataclass(frozen=True)
class Need:
    """The memory that a command needs, in bytes."""

    num_parameters: int  # of the target
    loading: int  # peak while the target is loaded ...
    cache_per_token: int  # of one token in the target's KV cache
    max_positions: int  # the target's context length in tokens
    dtype: torch.dtype
    held: int = 0  # ... and what the target holds afterwards
    beside: int = 0  # what a drafter and its learning hold beside it

    @property
    def total(self) -> int:
        """The peak at any time, without KV caches."""
        return max(self.loading, self.held + self.beside)


def estimate(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, dtype: torch.dtype, keeps_second_head: bool = False
) -> Need:
    """Estimates the memory of a checkpoint with tensors of these shapes.

    Args:
        keeps_second_head: True for our decoder with prepacked products. Layer by layer, it replaces weights by packed
            ones, but it keeps the head in both forms, and packing a weight needs two more copies of it for a moment.
    """
    sizes = {name: math.prod(dims) for name, dims in shapes.items()}
    layer, total = config.layer, sum(sizes.values())
    held, passing = total, 0
    if keeps_second_head:
        head = config.vocab_size * layer.hidden_size
        held += head
        passing = 2 * max(head, 2 * layer.intermediate_size * layer.hidden_size)
    return Need(
        num_parameters=total,
        loading=round(_SLACK * (held + passing) * dtype.itemsize),
        held=round(_SLACK * held * dtype.itemsize),
        cache_per_token=2 * config.num_layers * layer.num_kv_heads * layer.head_dim * dtype.itemsize,
        max_positions=config.max_positions,
        dtype=dtype,
    )


def check_memory(need: Need, device: torch.device, folder: Path) -> None:
    """Refuses a target that does not fit into memory; warns if a request of the whole context would not fit.

    Raises:
        ValueError: naming needed and available memory, and what to do.
    """
    available = available_bytes(device)
    if available is None:
        return
    dtype = str(need.dtype).removeprefix("torch.")
    smaller = "--dtype bfloat16, " if need.dtype.itemsize > 2 else ""
    if need.loading > available:
        raise ValueError(
            f"{folder} needs about {need.loading / _GIB:.1f} GiB of memory ({need.num_parameters / 1e6:,.0f} million "
            f"parameters in {dtype}), {available / _GIB:.1f} GiB are available on {device}; "
            f"use {smaller}another --device or a smaller model"
        )
    if need.total > available:
        raise ValueError(
            f"{folder} needs about {need.held / _GIB:.1f} GiB of memory ({need.num_parameters / 1e6:,.0f} million "
            f"parameters in {dtype}), its drafter and learning {need.beside / _GIB:.1f} GiB more, "
            f"{available / _GIB:.1f} GiB are available on {device}; use {smaller}another --device, "
            "a smaller model, or --drafter ngram, which needs none"
        )
    num_tokens = (available - need.total) // need.cache_per_token
    if num_tokens < need.max_positions:
        log.warning(
            "memory on %s will do for requests of about %s tokens, not for the whole context of %s",
            device,
            f"{num_tokens:,}",
            f"{need.max_positions:,}",
        )


# --- the drafter and learning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrafterSize:
    """The size of a drafter with float32 weights."""

    num_parameters: int  # without those that it shares with the target
    num_learning: int  # parameters that learn; the matrix products for drafting are made from these
    own_head_width: int = 0  # hidden size of its own head; 0 if it uses the target's head


@dataclass(frozen=True)
class Products:
    """The kinds of matrix products that a drafter uses, for its layers and for its head."""

    layers: MakeLinear
    head: MakeLinear
    vocab_size: int  # number of tokens of its draft vocabulary


_LISTS = 2  # draft vocabularies: the one for drafting, and the one with a batch's tokens
# Bytes per element that a product needs beside the weight itself. For PackedLinear, not listed: the weight's item size.
_FORWARD: dict[MakeLinear, int] = {PlainLinear: 0, HalfLinear: 2}
# Bytes per element of a layer's weight in `FastLayer`, which fuses and scales it, so that even a plain one is a copy.
_COPIED: dict[MakeLinear, int] = {PlainLinear: 4, HalfLinear: 2}
_FLOAT32 = 4
_SEEN = 16  # bytes per token of the vocabulary for the counts of a draft vocabulary


def drafting_bytes(size: DrafterSize, shape: ModelConfig, dtype: torch.dtype, products: Products) -> int:
    """Returns the bytes that a drafter holds for drafting.

    These are its float32 weights, the products of its layers, and for its head [V, D] the product over the whole
    vocabulary. For each draft vocabulary they are a copy of its rows of the head, the product with these, and a copy of
    its rows of the target's head if the drafter has another one.
    """
    head, listed, itemsize = _head_sizes(size, shape, dtype, products)
    layout = _FORWARD.get(products.head, itemsize)
    labels = _label_bytes(size, shape, dtype, products)
    layers = _COPIED.get(products.layers, _FLOAT32)
    held = _FLOAT32 * size.num_parameters + layers * size.num_learning
    held += _SEEN * shape.vocab_size
    return int(held + head * layout + _LISTS * (listed * (itemsize + layout) + labels))


def learning_bytes(
    size: DrafterSize,
    shape: ModelConfig,
    dtype: torch.dtype,
    products: Products,
    num_copies: int,
    apart: str = "",
    has_one_matrix: bool = False,
) -> int:
    """Returns the bytes that learning holds beside the drafter that drafts.

    For the gradient through a frozen head, these are the product with the transposed head, over the whole vocabulary
    and the draft vocabularies, and the transposed head while that is made. Added are float32 copies of the weights that
    learn: moments, gradients, weights. Learning in a thread has a drafter of its own, which does not draft; in a
    process it also has the target's embedding and head.

    Args:
        num_copies: Number of float32 copies of the weights that learn; see `copies_of` in `learning/footprint.py`.
        apart: Where learning runs: "thread" or "process"; empty for inline.
        has_one_matrix: Whether the target's embedding and head are tied.
    """
    head, listed, itemsize = _head_sizes(size, shape, dtype, products)
    layout = _FORWARD.get(products.head, itemsize)
    transposed = layout or itemsize  # for a plain product, the transpose is a copy
    passing = head * (itemsize + layout) if layout else 0
    total = _FLOAT32 * size.num_learning * num_copies + (head + _LISTS * listed) * transposed + passing
    if apart:
        labels = _label_bytes(size, shape, dtype, products)
        total += (
            _SEEN * shape.vocab_size
            + _FLOAT32 * size.num_parameters
            + head * layout
            + _LISTS * (listed * (itemsize + layout) + labels)
        )
    if apart == "process":
        total += shape.vocab_size * shape.layer.hidden_size * dtype.itemsize * (1 if has_one_matrix else 2)
    return int(total)


def _head_sizes(size: DrafterSize, shape: ModelConfig, dtype: torch.dtype, products: Products) -> tuple[int, int, int]:
    """Returns the number of elements of the head and of its rows for a draft vocabulary, and the bytes per element."""
    width = size.own_head_width or shape.layer.hidden_size
    itemsize = _FLOAT32 if size.own_head_width else dtype.itemsize
    return shape.vocab_size * width, min(shape.vocab_size, products.vocab_size) * width, itemsize


def _label_bytes(size: DrafterSize, shape: ModelConfig, dtype: torch.dtype, products: Products) -> int:
    """Returns the bytes of a draft vocabulary's rows of the target's head; 0 unless the drafter has its own head."""
    listed = min(shape.vocab_size, products.vocab_size)
    return listed * shape.layer.hidden_size * dtype.itemsize if size.own_head_width else 0


# --- available memory -------------------------------------------------------------------------------------------------


def available_bytes(device: torch.device) -> int | None:
    """Returns the bytes that are available on a device now; None if unknown."""
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
    try:  # elsewhere than on Linux: the installed memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _left_in_group(groups: Path = _GROUPS, membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns the bytes left below the tightest limit of this process's control groups (v2); None without a limit."""
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
