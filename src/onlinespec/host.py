"""Copies between the host and the device. `to_host` is the only function that waits for the device.

On an accelerator, reading a tensor's values makes the host wait until all queued work is done. So a decoding step and a
learning round read values through `to_host` only: a step once, at its end. Tests replace it, to run on fake tensors
that have no values. On a CPU nothing is queued, so `engine/step.py` and `lossless/sampling.py` read some values
earlier. The rejection rule, which is for comparisons only, reads more often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Any]:
    """Returns the values of each tensor as nested lists, or as one number if the tensor has no axes.

    >>> import torch
    >>> to_host(torch.tensor([1, 2]), torch.tensor(0.5))
    [[1, 2], 0.5]
    """
    return [_numbers(tensor) for tensor in tensors]


def to_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a tensor of numbers given as lists or arrays, integers as int64, without waiting for the copy.

    >>> to_device([], torch.device("cpu"), torch.int64).dtype
    torch.int64
    """
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def _numbers(tensor: Tensor) -> Any:
    return tensor.tolist()
