"""Where numbers leave the device: the one function that waits for it.

On an accelerator every read of a tensor by Python makes the host wait for all work that was queued. A decoding step and
a learning round therefore read through this function alone, a step once, at its end. Tests replace it, to run on
tensors that hold no numbers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def to_host(*tensors: Tensor) -> list[Any]:
    """The numbers of each tensor as Python has them: nested lists, or one number of a tensor without axes.

    >>> import torch
    >>> to_host(torch.tensor([1, 2]), torch.tensor(0.5))
    [[1, 2], 0.5]
    """
    return [tensor.tolist() for tensor in tensors]
