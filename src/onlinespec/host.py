"""Where numbers leave the host and come back to it: the one function that waits for the device.

On an accelerator every read of a tensor by Python makes the host wait for all work that was queued. A decoding step and
a learning round therefore read through this function alone, a step once, at its end. Tests replace it, to run on
tensors that hold no numbers. On a CPU numbers are there anyway, so `decode` and `sampling` look at some of them
earlier; the rejection rule, for comparisons alone, waits more often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Any]:
    """The numbers of each tensor as Python has them: nested lists, or one number of a tensor without axes.

    >>> import torch
    >>> to_host(torch.tensor([1, 2]), torch.tensor(0.5))
    [[1, 2], 0.5]
    """
    return [_numbers(tensor) for tensor in tensors]


def to_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers that the host has, in lists or arrays, whole numbers as int64; nobody waits for it.

    >>> to_device([], torch.device("cpu"), torch.int64).dtype
    torch.int64
    """
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def _numbers(tensor: Tensor) -> Any:
    return tensor.tolist()
