"""A submodule is called, not read: adapters, quantised, sharded, offloaded and hooked parts have their effect."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tilefuse
from tilefuse.nn import MoE, MultiheadLatentAttention, PagedKVCache, PagedLatentCache, WindowAttention

SIZES = {"kv_lora_rank": 128, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}


def latent_attention(**kwargs):
    torch.manual_seed(0)
    return MultiheadLatentAttention(48, 3, **SIZES, prefix_chunk=16, initializer_range=0.1, **kwargs)


def window_attention(offset=0.0):
    torch.manual_seed(0)
    attn = WindowAttention(48, 3, qk_norm=True, norm_weight_offset=offset, initializer_range=0.2)
    with torch.no_grad():
        for norm in (attn.q_norm, attn.k_norm):
            norm.weight.add_(torch.rand(16))
    return attn


def moe(**kwargs):
    torch.manual_seed(0)
    options = {"correction_bias": True, "num_shared_experts": 1, "initializer_range": 0.2}
    return MoE(32, 24, 8, 3, score="sigmoid", **options | kwargs)


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def new_cache(attn, layout="bf16"):
    if isinstance(attn, WindowAttention):
        return PagedKVCache(2, 64, num_kv_heads=3, head_dim=16, page_size=8, dtype=torch.float32)
    sizes = {"kv_lora_rank": 128, "qk_rope_head_dim": 8}
    return PagedLatentCache(2, 64, **sizes, page_size=8, layout=layout, dtype=torch.float32)


@torch.no_grad()
def cached(attn, x, schedule=(18, 1, 3), layout="bf16"):
    """Prefill, decode and a chunk, with one sequence that stops early."""
    cache, outs, start = new_cache(attn, layout), [], 0
    for n in schedule:
        lengths = [n, n if start < 18 else 0]
        cache.extend(n, lengths)
        out = attn(x[:, start : start + n], cache=cache)
        outs.append(out if lengths[1] else out[:1])
        start += n
    return [*outs, cache]


def compare(got, want):
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def check_attention(attn, equal, x=None):
    """``attn``, one part of which must be called, against the plain module that it equals, in all three ways to run."""
    x = tokens(2, 22, 48) if x is None else x
    compare(attn(x), equal(x))
    *got, _ = cached(attn, x)
    *want, _ = cached(equal, x)
    for a, b in zip(got, want):
        compare(a, b)


def lora(module, **kwargs):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    # adapters that start at zero would show nothing
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **kwargs)
    return peft.inject_adapter_in_model(config, module)


def merged(module):
    from peft.tuners.tuners_utils import BaseTunerLayer

    module = copy.deepcopy(module)
    for name, part in list(module.named_children()):
        if isinstance(part, BaseTunerLayer):
            for layer in part.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.merge()
            setattr(module, name, part.get_base_layer())
    return module


def test_lora_on_the_latent_up_projection():
    plain = latent_attention()
    attn = lora(copy.deepcopy(plain), target_modules=["kv_b_proj", "o_proj", "q_proj"])
    equal = merged(attn)
    assert type(equal.kv_b_proj) is nn.Linear
    x = tokens(2, 22, 48)
    assert (attn(x) - plain(x)).abs().max() > 0.01
    check_attention(attn, equal)
    (attn(x).square().sum()).backward()
    layer = attn.kv_b_proj
    for part in (layer.lora_A["default"], layer.lora_B["default"]):
        assert part.weight.grad.abs().sum() > 0


class Int8Linear(nn.Module):
    """A weight-only quantised layer as other libraries have them; its codes alone mean nothing."""

    def __init__(self, layer):
        super().__init__()
        scale = layer.weight.detach().abs().amax(1) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def dequantized(self):
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        layer.weight = nn.Parameter(self.weight * self.scale[:, None])
        return layer

    def forward(self, x):
        return (x @ self.weight.to(x.dtype).T) * self.scale


def test_an_int8_layer_in_place_of_the_latent_up_projection():
    attn, equal = latent_attention(), latent_attention()
    attn.kv_b_proj = Int8Linear(attn.kv_b_proj)
    equal.kv_b_proj = attn.kv_b_proj.dequantized()
    check_attention(attn, equal)


def test_a_bias_on_the_latent_up_projection():
    attn, plain = latent_attention(), latent_attention()
    layer = nn.Linear(128, 84)
    layer.weight = attn.kv_b_proj.weight
    attn.kv_b_proj = layer
    x = tokens(2, 22, 48)
    assert (attn(x) - plain(x)).abs().max() > 1e-3
    compare(torch.cat([out[:1] for out in cached(attn, x)[:-1]], 1), attn(x)[:1].detach())


def doubled(module, args, out):
    return 2 * out


@pytest.mark.parametrize("part", ["kv_b_proj", "kv_a_layernorm"])
def test_hooks_of_latent_attention(part):
    """A hook that doubles the output is doubled weights."""
    attn, equal = latent_attention(), latent_attention()
    getattr(attn, part).register_forward_hook(doubled)
    with torch.no_grad():
        getattr(equal, part).weight.mul_(2)
    check_attention(attn, equal)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("part", ["q_norm", "k_norm"])
def test_hooks_of_window_attention(part, offset):
    attn, equal = window_attention(offset), window_attention(offset)
    getattr(attn, part).register_forward_hook(doubled)
    with torch.no_grad():
        getattr(equal, part).weight.add_(offset).mul_(2).sub_(offset)
    check_attention(attn, equal)


class PlainRMSNorm(nn.RMSNorm):
    """The formula, in a class that no one reads."""


def norms(dim, eps):
    """A norm that may be read, and one that is called."""
    pair = nn.RMSNorm(dim, eps=eps), PlainRMSNorm(dim, eps=eps)
    with torch.no_grad():
        for norm in pair:
            norm.weight.copy_(torch.linspace(0.5, 2, dim))
    return pair


@pytest.mark.parametrize("eps", [0.3, None])
def test_another_norm_in_the_place_of_one(eps):
    """Its eps counts, and that it has no offset."""
    attn, equal = latent_attention(), latent_attention()
    attn.kv_a_layernorm, equal.kv_a_layernorm = norms(128, eps)
    check_attention(attn, equal)
    for parts in (["q_norm"], ["q_norm", "k_norm"]):
        attn, equal = window_attention(1.0), window_attention(1.0)
        for part in parts:
            read, called = norms(16, eps)
            setattr(attn, part, read)
            setattr(equal, part, called)
        check_attention(attn, equal)


def test_norms_without_weights():
    attn, equal = window_attention(), window_attention()
    for part in ("q_norm", "k_norm"):
        setattr(attn, part, nn.RMSNorm(16, eps=1e-6, elementwise_affine=False))
        getattr(equal, part).weight.data.fill_(1.0)
    check_attention(attn, equal)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_another_rotary_embedding_in_the_place_of_one(qk_norm):
    class Backwards(tilefuse.nn.RotaryEmbedding):
        def forward(self, q, k, positions):
            return super().forward(q, k, 40 - positions)

    attn, equal = (WindowAttention(48, 3, qk_norm=qk_norm, initializer_range=0.2) for _ in range(2))
    equal.load_state_dict(attn.state_dict())
    attn.rotary_emb = Backwards(16)
    # tables of negative angles, and another origin, which scores do not see
    equal.rotary_emb.sin.neg_()
    x, positions = tokens(2, 22, 48), torch.arange(22).expand(2, -1)
    compare(attn(x, positions), equal(x, positions))
    *got, _ = cached(attn, x)
    *want, _ = cached(equal, x)
    for a, b in zip(got, want):
        compare(a, b)


def test_another_rotary_embedding_of_latent_attention():
    attn, equal = latent_attention(), latent_attention(interleaved=False)
    attn.rotary_emb = equal.rotary_emb
    check_attention(attn, equal)


@pytest.mark.parametrize("layout", ["bf16", "fp8"])
def test_rows_of_a_called_norm_are_those_of_the_fused_one(layout):
    """Also what padding leaves alone: no slot is written that the op does not write."""
    attn, equal, x = latent_attention(), latent_attention(), tokens(2, 22, 48)
    attn.kv_a_layernorm.register_forward_hook(lambda module, args, out: None)
    (*_, got), (*_, want) = cached(attn, x, layout=layout), cached(equal, x, layout=layout)
    if layout == "bf16":
        compare(got.rows, want.rows)
    else:
        # one code may round the other way
        assert (got.rows != want.rows).float().mean() < 0.01
    assert torch.equal(got.rows[0].eq(0).all(-1), want.rows[0].eq(0).all(-1))
    # nothing to write at all
    rows = got.rows.clone()
    got.extend(1, [0, 0])
    with torch.no_grad():
        attn(x[:, :1], cache=got)
    assert torch.equal(rows, got.rows)


def test_lora_on_the_parameters_of_moe():
    plain, x = moe(), tokens(2, 12, 32)
    parts = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    adapted = lora(copy.deepcopy(plain), target_modules=[], target_parameters=parts)
    equal = merged(adapted)
    assert type(equal.experts) is type(plain.experts) and type(equal.gate) is type(plain.gate)
    out = adapted(x)
    assert (out - plain(x)).abs().max() > 0.01
    compare(out, equal(x))
    out.square().sum().backward()
    adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 6 and all(p.grad.abs().sum() > 0 for p in adapters.values())
    # what reaches for the parts inside
    adapted.update_bias()
    equal.update_bias()
    assert adapted.gate.base_layer.e_score_correction_bias.equal(equal.gate.e_score_correction_bias)
    adapted.reset_parameters()
    assert "correction_bias=True" in repr(adapted)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_parts(group_of_one):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for make, parts, x in (
        (moe, ("experts", "gate"), tokens(2, 12, 32)),
        (latent_attention, ("kv_b_proj", "kv_a_layernorm"), tokens(2, 22, 48)),
        (window_attention, ("q_norm",), tokens(2, 22, 48)),
    ):
        sharded, plain = make(), make()
        for part in parts:
            fully_shard(getattr(sharded, part), mesh=group_of_one)
            assert all(isinstance(p, DTensor) for p in getattr(sharded, part).parameters())
        outs = [module(x) for module in (sharded, plain)]
        compare(*outs)
        for out in outs:
            out.square().sum().backward()
        for got, want in zip(sharded.parameters(), plain.parameters()):
            grad = got.grad.full_tensor() if isinstance(got.grad, DTensor) else got.grad
            torch.testing.assert_close(grad, want.grad, rtol=1e-3, atol=1e-3 * float(want.grad.abs().max()))
        if make is not moe:
            check_attention(sharded, plain)


@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded(buffers):
    accelerate = pytest.importorskip("accelerate")
    for make, x in ((moe, tokens(2, 12, 32)), (latent_attention, None), (window_attention, None)):
        plain = make().eval()
        offloaded = accelerate.cpu_offload(make().eval(), torch.device("cpu"), offload_buffers=buffers)
        assert all(p.is_meta for p in offloaded.parameters())
        with torch.no_grad():
            if x is None:
                check_attention(offloaded, plain)
            else:
                compare(offloaded(x), plain(x))


def test_block_pattern_of_a_wrapped_query():
    attn = tilefuse.nn.BlockSparseAttention(64, 2, "bigbird", block_size=16)
    attn.query = nn.Sequential(attn.query)
    assert attn.pattern(160).row_offsets.device.type == "cpu"
