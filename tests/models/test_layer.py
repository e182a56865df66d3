"""The fast layer against the plain one, over random shapes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onlinespec.models.kv_cache import KVCache
from onlinespec.models.layer import (
    FastLayer,
    LayerConfig,
    Rows,
    Seen,
    make_plan,
    plain_keys_values,
    plain_layer,
    rotary_at,
)
from onlinespec.models.linear import PlainLinear, linear_for
from onlinespec.models.rope import Rope, RotaryTables

CONFIGS = [
    LayerConfig(64, 160, 4, 2, 16, 1e-6, Rope(10_000.0)),
    LayerConfig(64, 96, 4, 4, 32, 1e-5, Rope(1_000_000.0)),
    LayerConfig(96, 224, 6, 1, 8, 1e-6, Rope(500.0)),
    LayerConfig(64, 160, 4, 2, 16, 1e-6, Rope(10_000.0, share=0.75)),
]


def weights_of(
    config: LayerConfig, has_biases: bool, has_head_norms: bool, has_input_norm: bool
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(config.hidden_size)
    d, f, e = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * e, config.num_kv_heads * e
    rows = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    rows |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    weights = {f"{n}.weight": torch.randn(dims, generator=generator) / dims[1] ** 0.5 for n, dims in rows.items()}
    if has_biases:
        weights |= {f"{n}.bias": 0.3 * torch.randn(dims[0], generator=generator) for n, dims in rows.items()}
    norms = {"post_attention_layernorm": d}
    norms |= {"self_attn.q_norm": e, "self_attn.k_norm": e} if has_head_norms else {}
    norms |= {"input_layernorm": d} if has_input_norm else {}
    return weights | {f"{n}.weight": 1 + 0.3 * torch.randn(size, generator=generator) for n, size in norms.items()}


@pytest.mark.parametrize("config", CONFIGS, ids=["grouped", "wide heads", "one key head", "part of a head turns"])
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("has_head_norms", [False, True])
@pytest.mark.parametrize("has_input_norm", [False, True])
@pytest.mark.parametrize("make_linear", [PlainLinear, linear_for(torch.device("cpu"), torch.float32)])
def test_fast_equals_plain(config, has_biases, has_head_norms, has_input_norm, make_linear):
    weights = weights_of(config, has_biases, has_head_norms, has_input_norm)
    x = torch.randn(45, config.hidden_size, generator=torch.Generator().manual_seed(1))
    turns = rotary_at(torch.arange(45), config)
    keys, values = plain_keys_values(config, weights, x, turns)
    is_visible = torch.ones(45, 45).tril().bool()
    halves = [Seen(keys[part], values[part], is_visible[:, part]) for part in (slice(20), slice(20, 45))]
    wanted = plain_layer(config, weights, x, turns, halves)

    cache = KVCache(1, config.num_kv_heads, config.head_dim, torch.device("cpu"), torch.float32)
    cache.take(0, 45)
    layer, rotary = (
        FastLayer(config, weights, make_linear),
        RotaryTables(config.rope, config.head_dim, torch.device("cpu")),
    )
    num_heads, pieces = config.num_heads + config.num_kv_heads, []
    for part in x.split([1, 40, 4]):
        pieces.append(layer(part, make_plan(Rows([0], [cache.lengths[0]], [len(part)]), rotary, cache, num_heads), 0))
        cache.extend(0, len(part))
    torch.testing.assert_close(torch.cat(pieces), wanted, atol=1e-5, rtol=1e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="4 heads can't share 3"):
        LayerConfig(64, 160, 4, 3, 16, 1e-6, Rope(10_000.0))
    with pytest.raises(ValueError, match="head_dim is 15"):
        LayerConfig(64, 160, 4, 2, 15, 1e-6, Rope(10_000.0))


# --- what is done for equal bits on a CPU, and on other devices would only cost kernels ------------------------------


class Calls(TorchDispatchMode):
    """Which operators ran, and over how many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, list[int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.setdefault(function.overloadpacket.__name__, []).append(result.numel())
        return result


def calls_of(device: str, num_rows: int) -> dict[str, list[int]]:
    """Of one layer with one key-value head and three query heads, over so many new tokens."""
    config = LayerConfig(96, 1024, 3, 1, 32, 1e-6, Rope(10_000.0))
    weights = {name: t.to(device) for name, t in weights_of(config, False, False, True).items()}
    layer = FastLayer(config, weights, PlainLinear)
    cache = KVCache(1, 1, 32, torch.device(device), torch.float32)
    cache.take(0, 100)
    with torch.inference_mode(), Calls() as calls:
        rows, rotary = Rows([0], [0], [num_rows]), RotaryTables(config.rope, 32, torch.device(device))
        layer(torch.zeros(num_rows, 96, device=device), make_plan(rows, rotary, cache, 4), 0)
    return calls.sizes


def test_gates_and_rotations_are_cut_for_threads_on_a_cpu_alone():
    gates = {device: calls_of(device, 64)["silu"] for device in ("cpu", "meta")}
    assert len(gates["cpu"]) > 1
    assert gates["meta"] == [64 * 1024]
    assert sum(gates["cpu"]) == 64 * 1024


def test_a_lone_query_gets_company_and_an_odd_group_another_head_on_a_cpu_alone():
    sizes = {device: calls_of(device, 1)["scaled_dot_product_attention"] for device in ("cpu", "meta")}
    assert sizes == {"cpu": [2 * 4 * 32], "meta": [3 * 32]}
