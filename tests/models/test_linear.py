"""Products: the plain one is the reference, the prepacked one does not look at its neighbours."""

from __future__ import annotations

import pytest
import torch

from onlinespec.models import linear as module
from onlinespec.models.linear import (
    FrozenProduct,
    HalfLinear,
    PackedLinear,
    PlainLinear,
    bf16_matmul,
    can_pack,
    can_pack_half,
    draft_linear_for,
    has_bfloat16_units,
    learn_product_for,
    linear_for,
    plain_product,
)

packs = pytest.mark.skipif(not can_pack(), reason="this processor has no prepacked products")
packs_half = pytest.mark.skipif(not can_pack_half(), reason="this processor has no prepacked products in bfloat16")
SHAPES = [(768, 256), (256, 768), (4096, 256), (1024, 1024), (48, 96), (33, 50)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@packs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_equals_plain_and_has_the_same_bits_for_any_number_of_rows(shape, has_bias):
    weight, bias = draw(*shape), draw(shape[0]) if has_bias else None
    x = draw(520, shape[1])
    packed = PackedLinear(weight, bias)
    together = packed(x)
    torch.testing.assert_close(together, PlainLinear(weight, bias)(x), atol=1e-3, rtol=1e-4)
    for rows in (1, 2, 3, 5, 8, 17, 64, 511):
        assert torch.equal(packed(x[:rows].contiguous()), together[:rows]), rows


@packs
@pytest.mark.parametrize("num_rows", [5, 45])
@pytest.mark.parametrize("make_linear", [PlainLinear, PackedLinear, pytest.param(HalfLinear, marks=packs_half)])
def test_a_frozen_product_has_the_gradient_of_the_plain_one(make_linear, num_rows):
    weight, x, grad = draw(96, 64), draw(num_rows, 64).requires_grad_(), draw(num_rows, 96)
    tolerance = {"atol": 0.3, "rtol": 0.05} if make_linear is HalfLinear else {"atol": 1e-4, "rtol": 1e-4}
    product = FrozenProduct(weight, make_linear)(x)
    torch.testing.assert_close(product, x @ weight.T, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(product, x, grad)[0], grad @ weight, **tolerance)


@pytest.mark.parametrize("num_rows", [1, 31, 32, 45])
@pytest.mark.parametrize("sets", [(), (3,)], ids=["one set of weights", "three"])
def test_a_half_product_and_both_its_gradients_are_the_plain_ones_but_for_rounding(num_rows, sets):
    x, weight, grad = draw(*sets, num_rows, 64), draw(*sets, 96, 64), draw(*sets, num_rows, 96)
    inputs = x.requires_grad_(), weight.requires_grad_()
    half, plain = bf16_matmul(*inputs), plain_product(*inputs)
    for one, other in zip(
        (half, *torch.autograd.grad(half, inputs, grad)),
        (plain, *torch.autograd.grad(plain, inputs, grad)),
        strict=True,
    ):
        assert one.dtype == other.dtype == torch.float32
        assert one.shape == other.shape
        assert (one - other).norm() < 0.01 * other.norm()


def test_where_packing_is_missing_the_plain_product_serves(monkeypatch):
    monkeypatch.setattr(module, "can_pack", lambda: False)
    assert learn_product_for(torch.device("cpu")) is plain_product
    assert linear_for(torch.device("cpu"), torch.float32) is PlainLinear
    assert draft_linear_for(torch.device("cpu"), torch.float32) is PlainLinear


def test_an_operator_that_fails_means_packing_is_missing(monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("not compiled in")

    monkeypatch.setattr(PackedLinear, "__init__", fail)
    assert not can_pack.__wrapped__()


@pytest.mark.skipif(not has_bfloat16_units(), reason="this processor does not multiply bfloat16 natively")
def test_where_bfloat16_is_native_it_is_packed():
    assert can_pack_half() == can_pack()


def test_a_processor_that_packs_float32_alone_takes_plain_products_in_bfloat16(monkeypatch):
    pack = module._pack

    def without_avx512(weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support avx512")
        return pack(weight)

    monkeypatch.setattr(module, "_pack", without_avx512)
    monkeypatch.setattr(module, "can_pack_half", can_pack_half.__wrapped__)
    assert linear_for(torch.device("cpu"), torch.bfloat16) is PlainLinear
    assert linear_for(torch.device("cpu"), torch.float32) is (PackedLinear if can_pack() else PlainLinear)


@packs
def test_no_rows_give_no_rows():
    assert PackedLinear(draw(48, 96))(draw(0, 96)).shape == (0, 48)


def test_other_devices_and_half_precision_take_the_plain_product():
    assert linear_for(torch.device("cuda"), torch.float32) is PlainLinear
    assert linear_for(torch.device("cpu"), torch.float16) is PlainLinear
