"""Matrix products: a plain one, and oneDNN's prepacked one, whose bits do not depend on the number of rows.

`F.linear` uses another kernel for one row than for five, and the float32 bits differ. If the weight is packed for
several rows beforehand, oneDNN uses one kernel for any number of rows from two on, and a row's result does not depend
on the others (for a single row see `PackedLinear`). This makes speculative decoding bit-exact on a CPU. It is also
faster at 2 to 8 rows. The operators are private to torch (inductor's freezing emits them), so `can_pack` tests whether
they exist.

Axis letters: N rows, D inputs, F outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]  # x [N, D] to x @ weight.T + bias, [N, F]
MakeLinear = Callable[[Tensor, Tensor | None], Linear]  # from a weight [F, D] and a bias [F]

Product = Callable[[Tensor, Tensor], Tensor]  # x [..., N, D] times a trainable weight [..., F, D]

_ROWS_PACKED_FOR = 8  # any number from two on avoids oneDNN's kernel for one row
_ROWS_COMPILED_FOR = 32  # rows are padded to a multiple of this, as oneDNN compiles a kernel per row count in 0.25 ms
_FEW_ROWS = 16  # no padding up to this many rows, as in a decoding step: kernels for so few row counts soon exist


class PlainLinear:
    """x @ weight.T + bias: the reference, used where packing is not available."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weight, self.bias)


class PackedLinear:
    """x @ weight.T + bias with a weight packed for oneDNN. Without gradient, and on a CPU only.

    With more than about 1,024 columns, oneDNN sums a single row in another order than several. This is tested once per
    shape, and with such a weight a single row is computed twice.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = _pack(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().contiguous()
        self._can_be_alone = _can_be_alone(*weight.shape, weight.dtype)

    def __call__(self, x_ND: Tensor) -> Tensor:
        if not self._can_be_alone and x_ND.shape[0] == 1:
            return _multiply(x_ND.expand(2, -1), self._packed, self._bias)[:1]
        return _multiply(x_ND, self._packed, self._bias)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_PACKED_FOR)
    return packed


def _multiply(x_ND: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_ND, packed, bias, "none", [], "")
    return product


@cache
def _can_be_alone(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> bool:
    """Whether a single row gets the same bits as it does among several, in a product of this shape."""
    generator = torch.Generator().manual_seed(0)
    packed = _pack(torch.randn(num_outputs, num_inputs, generator=generator).to(dtype))
    x_2D = torch.randn(1, num_inputs, generator=generator).to(dtype).expand(2, -1)
    return torch.equal(_multiply(x_2D[:1], packed, None), _multiply(x_2D, packed, None)[:1])


@cache
def can_pack() -> bool:
    """Whether packing is available on this machine, and a row gets the same bits alone as among others, in float32."""
    try:
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(0)
            for size in (64, 2048):
                x_ND = torch.randn(8, size, generator=generator)
                linear = PackedLinear(torch.randn(96, size, generator=generator))
                alone = torch.cat([linear(row_D[None]) for row_D in x_ND])
                if not all(torch.equal(linear(x_ND[:rows]), alone[:rows]) for rows in (2, 3, 5, 8)):
                    return False
            return True
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@cache
def can_pack_half() -> bool:
    """Whether bfloat16 weights can be packed, too: torch refuses without AVX-512. Equal bits are tested in float32."""
    try:
        PackedLinear(torch.zeros(16, 16, dtype=torch.bfloat16))
        return can_pack()
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def linear_for(device: torch.device, dtype: torch.dtype) -> MakeLinear:
    """Returns the fastest exact kind of product: packed for float32 and bfloat16 on a CPU if possible, else plain."""
    can = {torch.float32: can_pack, torch.bfloat16: can_pack_half}.get(dtype)
    return PackedLinear if device.type == "cpu" and can and can() else PlainLinear


class HalfLinear:
    """A float32 product computed in bfloat16, prepacked: half the bytes to read, 8 significant bits instead of 24."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._product = PackedLinear(weight.bfloat16(), None if bias is None else bias.bfloat16())

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self._product(_half(x_ND))[: len(x_ND)].float()


class FrozenProduct:
    """A product with a frozen weight [V, D], differentiable in its input. Both directions are made by `make_linear`.

    The target's head takes a large part of a learning round; prepacked it took 0.2 (bfloat16) to 0.4 (float32) of
    `F.linear`'s time.
    """

    def __init__(self, weight: Tensor, make_linear: MakeLinear) -> None:
        self._weight, self._make_linear = weight, make_linear
        self.forward = make_linear(weight, None)

    def __call__(self, x_ND: Tensor) -> Tensor:
        apply: Any = _FrozenProduct.apply
        product: Tensor = apply(x_ND, self) if x_ND.requires_grad else self.forward(x_ND)
        return product

    @cached_property
    def backward(self) -> Linear:
        """The product with the transposed weight, made when the first gradient is computed."""
        return self._make_linear(self._weight.t().contiguous(), None)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, product: FrozenProduct) -> Tensor:
        ctx.product = product
        return product.forward(x_ND.detach())

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, None]:
        return ctx.product.backward(grad_NV), None


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x @ weight.mT [..., N, F]: the reference. With a leading axis of sets, each has its own x and weight."""
    return F.linear(x, weight) if weight.dim() == 2 else torch.bmm(x, weight.mT)


def bf16_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """Returns the same as `plain_product`, computed in bfloat16. So are the gradients.

    Results are rounded to bfloat16, and returned in float32. On a processor with bfloat16 units it took a third to a
    quarter of `plain_product`'s time (AMD EPYC, Zen 5).
    """
    apply: Any = _HalfProduct.apply
    product: Tensor = apply(x, weight)
    return product


class _HalfProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x_half, weight_half = _half(x), weight.bfloat16()
        ctx.save_for_backward(x_half, weight_half)
        return (x_half @ weight_half.mT)[..., : x.shape[-2], :].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x_half, weight_half = ctx.saved_tensors
        grad_half = _half(grad)
        of_x = (grad_half @ weight_half)[..., : grad.shape[-2], :].float() if ctx.needs_input_grad[0] else None
        return of_x, (grad_half.mT @ x_half).float()


def _half(x: Tensor) -> Tensor:
    """Converts to bfloat16. Pads more than _FEW_ROWS rows with zeros, so that nearby numbers of rows share a kernel."""
    count, width = x.shape[-2:]
    if count <= _FEW_ROWS or count % _ROWS_COMPILED_FOR == 0:
        return x.bfloat16()
    padded = x.new_zeros(
        (*x.shape[:-2], -(-count // _ROWS_COMPILED_FOR) * _ROWS_COMPILED_FOR, width), dtype=torch.bfloat16
    )
    padded[..., :count, :] = x
    return padded


def learn_product_for(device: torch.device) -> Product:
    """Returns the fastest product for learning: `bf16_matmul` if the processor has bfloat16 units, else plain."""
    return bf16_matmul if device.type == "cpu" and can_pack() and has_bfloat16_units() else plain_product


def draft_linear_for(device: torch.device, dtype: torch.dtype) -> MakeLinear:
    """Returns the fastest product for drafting.

    For float32 on a CPU: `HalfLinear` if the processor has bfloat16 units, else plain. Otherwise as `linear_for`.
    Drafts may be rounded, because verification is exact. For the same reason, float32 weights are not packed: for one
    row a packed product is slower than `F.linear`, and packing takes time at every swap of weights.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return linear_for(device, dtype)
    return HalfLinear if can_pack() and has_bfloat16_units() else PlainLinear


def has_bfloat16_units() -> bool:
    """Whether the processor multiplies bfloat16 natively."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())
