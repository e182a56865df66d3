"""What a target, its drafter and their learning will take of memory, told from shapes before any weight is read.

Counts what can't be given back: weights in the dtype asked for, the second layouts that products keep, and keys and
values of requests. Pages of the checkpoint's files that are read along are not counted; the system drops them at need,
and what a forward or a round needs in passing isn't either, but for making the second layout of a head.
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
_SLACK = 1.15  # holes that an allocator leaves between layers: measured 1.04 to 1.18 (161 M parameters)
_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Bytes, and what they are for."""

    num_parameters: int
    loading: int  # the most while it is loaded ...
    cache_per_token: int
    max_positions: int
    dtype: torch.dtype
    held: int = 0  # ... and what of that stays
    beside: int = 0  # of a drafter and what learns it, once the target is loaded

    @property
    def total(self) -> int:
        """The most at any time, caches apart."""
        return max(self.loading, self.held + self.beside)


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
    """Refuses what does not fit; warns if a request of the whole context would not.

    Raises:
        ValueError: naming needed and available memory, and the way out.
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


# --- beside a target --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrafterSize:
    """A drafter in numbers, of float32 weights."""

    num_parameters: int  # all of its own
    num_learning: int  # of these, those that learn; they are the products that it drafts with
    own_head_width: int = 0  # hidden size that a head of its own reads; 0: its states go through the target's head


@dataclass(frozen=True)
class Products:
    """Which products a drafter draws on: its layers' and its head's."""

    layers: MakeLinear
    head: MakeLinear
    vocab_size: int  # tokens of its draft vocabulary


_LISTS = 2  # one that drafts are chosen from, and one that holds a batch's tokens
# Bytes of an element in a layout beside the weight; a packed product's are as many as the weight's own ...
_FORWARD: dict[MakeLinear, int] = {PlainLinear: 0, HalfLinear: 2}
# ... and of a layer's weight, once it is joined with others and scaled.
_COPIED: dict[MakeLinear, int] = {PlainLinear: 4, HalfLinear: 2}
_FLOAT32 = 4
_SEEN = 16  # bytes by which a list remembers how often a token was seen


def drafting_bytes(size: DrafterSize, shape: ModelConfig, dtype: torch.dtype, products: Products) -> int:
    """What a drafter holds that drafts.

    Float32 weights, the products that its layers compute with, and for the head, [V, D] elements, the layout for the
    whole vocabulary and lists of it: rows copied from the head, rows of the target's head where that is another, and
    their own layout.
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
    """What learning holds beside the drafter that drafts.

    For the gradient through a head that stays, its transpose, whole and of lists, in the layout of its products, and
    in passing the transpose itself while that is made; and float32 copies of what learns: moments, gradients, weights.
    A thread has a drafter of its own, which does not draft, and a process the target's embedding and head besides.

    Args:
        num_copies: Of what learns; see `footprint.copies_of`.
        apart: Where learning runs beside serving: "thread" or "process"; empty for inline.
        has_one_matrix: The target's embedding and head are one.
    """
    head, listed, itemsize = _head_sizes(size, shape, dtype, products)
    layout = _FORWARD.get(products.head, itemsize)
    transposed = layout or itemsize  # a plain product's other direction is a copy
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
    """Elements of the head, of a list's rows of it, and bytes of each."""
    width = size.own_head_width or shape.layer.hidden_size
    itemsize = _FLOAT32 if size.own_head_width else dtype.itemsize
    return shape.vocab_size * width, min(shape.vocab_size, products.vocab_size) * width, itemsize


def _label_bytes(size: DrafterSize, shape: ModelConfig, dtype: torch.dtype, products: Products) -> int:
    """Of a list's rows of the target's head, where the drafter's is another."""
    listed = min(shape.vocab_size, products.vocab_size)
    return listed * shape.layer.hidden_size * dtype.itemsize if size.own_head_width else 0


# --- what there is ----------------------------------------------------------------------------------------------------


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
