import pytest
import torch

import tilefuse
from tilefuse.nn import PagedKVCache, RotaryEmbedding, WindowAttention
from tilefuse.testing import assert_bit_equal, assert_close


def make(**kwargs):
    return WindowAttention(48, 4, 2, **{"head_dim": 16, "window": (9, 0), "max_position_embeddings": 128} | kwargs)


def make_cache(batch=2, max_length=64, **kwargs):
    options = {"num_kv_heads": 2, "head_dim": 16, "page_size": 8, "dtype": torch.float32}
    return PagedKVCache(batch, max_length, **options | kwargs)


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hf_attention(kind):
    import transformers
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mistral.modeling_mistral import MistralAttention
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    name, attention = {
        "llama": ("Llama", LlamaAttention),
        "mistral": ("Mistral", MistralAttention),
        "qwen2": ("Qwen2", Qwen2Attention),
        "qwen3": ("Qwen3", Qwen3Attention),
    }[kind]
    extra = {"sliding_window": 10} if kind != "llama" else {"attention_bias": True}
    if kind.startswith("qwen"):
        extra |= {"use_sliding_window": True, "layer_types": ["sliding_attention"], "num_hidden_layers": 1}
    config = getattr(transformers, f"{name}Config")(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **extra,
    )
    return config, attention(config, 0)


def hf_run(rotary, window):
    def run(module, x):
        length = x.shape[1]
        embeddings = tuple(torch.cat([t, t], -1)[None, :length].to(x.dtype) for t in (rotary.cos, rotary.sin))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance > window if window >= 0 else False)
        mask = torch.zeros(length, length, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
        return module(x, position_embeddings=embeddings, attention_mask=mask[None, None])[0]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_against_hugging_face(hf, kind, dtype):
    config, theirs = hf_attention(kind)
    ours = WindowAttention.from_config(config)
    assert ours.window == ((-1, 0) if kind == "llama" else (9, 0))
    hf(ours, theirs, tokens(2, 33, 48), hf_run(ours.rotary_emb, ours.window[0]), dtype=dtype)


def test_sinks_against_gpt_oss(hf):
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    config = transformers.GptOssConfig(
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=10,
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        attn_implementation="eager",
        attention_bias=True,
        attention_dropout=0.0,
    )
    ours = make(sinks=True, qkv_bias=True, o_bias=True)

    def run(module, x):
        # gpt-oss takes half-width tables
        embeddings = tuple(t[None, : x.shape[1]].to(x.dtype) for t in (ours.rotary_emb.cos, ours.rotary_emb.sin))
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        mask = torch.zeros(distance.shape, dtype=x.dtype).masked_fill((distance < 0) | (distance > 9), -1e30)
        return module(x, position_embeddings=embeddings, attention_mask=mask[None, None])[0]

    hf(ours, GptOssAttention(config, 0), tokens(2, 33, 48), run, dtype=torch.float32)


FORMS = {
    "window": {},
    "causal": {"window": (-1, 0)},
    "qk_norm": {"qk_norm": True, "norm_weight_offset": 1.0, "interleaved": True},
    "all": {"sinks": True, "softcap": 3.0, "rotary_dim": 8, "scale": 0.3, "qkv_bias": True},
}


@pytest.mark.parametrize("schedule", [[40], [17, 20, 3], [18, *[1] * 22], [4, 16, 20]], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_cache_equals_full_forward(form, schedule):
    dtype = torch.bfloat16 if form == "qk_norm" else torch.float32
    attn = make(**FORMS[form], dtype=dtype, initializer_range=0.2)
    exact = make(**FORMS[form], dtype=torch.float64)
    with torch.no_grad():
        for p in attn.parameters():
            p.add_(0.1 * torch.randn_like(p))
        exact.load_state_dict(attn.state_dict())
        x = tokens(2, 40, 48, dtype=dtype)
        plain, exact = attn(x), exact(x.double())
        cache, outs, start = make_cache(dtype=dtype, page_size=6), [], 0
        for n in schedule:
            cache.extend(n)
            outs.append(attn(x[:, start : start + n], cache=cache))
            start += n
    tiny = 2**-20 * float(exact.abs().max()) if dtype == torch.float32 else None
    assert_close(torch.cat(outs, 1), exact, plain, tiny=tiny)


def test_fp8_cache():
    attn = make(initializer_range=0.2)
    x = tokens(2, 40, 48)
    cache = make_cache(dtype=torch.float8_e4m3fn, k_scale=0.5, v_scale=0.25)
    with torch.no_grad():
        plain, outs = attn(x), []
        for part in x.split((20, 17, 1, 2), 1):
            cache.extend(part.shape[1])
            outs.append(attn(part, cache=cache))
    error = (torch.cat(outs, 1) - plain).norm() / plain.norm()
    assert error < 0.06


@pytest.mark.parametrize("qk_norm", [False, True])
def test_ragged_batch(qk_norm):
    attn = make(qk_norm=qk_norm, initializer_range=0.2)
    lengths = [[9, 20, 3], [12, 0, 5], [1, 1, 0], [0, 1, 1]]
    sequences = [tokens(sum(step[b] for step in lengths), 48, seed=b) for b in range(3)]
    cache, outs, done = make_cache(batch=3, num_pages=12), [[], [], []], [0, 0, 0]
    with torch.no_grad():
        alone = [attn(s[None])[0] for s in sequences]
        for step in lengths:
            x = torch.full((3, max(step), 48), 7.0)
            for b, n in enumerate(step):
                x[b, :n] = sequences[b][done[b] : done[b] + n]
                done[b] += n
            cache.extend(max(step), step)
            y = attn(x, cache=cache)
            assert y.isfinite().all()
            for b, n in enumerate(step):
                outs[b].append(y[b, :n])
    for b in range(3):
        torch.testing.assert_close(torch.cat(outs[b]), alone[b], rtol=2e-5, atol=2e-6)


def test_packed_equals_separate():
    for qk_norm in (False, True):
        attn = make(qk_norm=qk_norm, initializer_range=0.2)
        x = tokens(30, 48)
        packed = attn(x, cu_seqlens=torch.tensor([0, 11, 11, 30]))
        separate = torch.cat([attn(x[None, :11])[0], attn(x[None, 11:])[0]])
        torch.testing.assert_close(packed, separate, rtol=2e-5, atol=2e-6)


def test_compile():
    attn = make(initializer_range=0.2)
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
    x = tokens(2, 24, 48).requires_grad_()
    want, got = attn(x), compiled(x)
    assert_bit_equal(want.detach(), got.detach())
    assert_bit_equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (want, got)))
    results = []
    with torch.no_grad():
        for module in (attn, compiled):
            cache = make_cache()
            cache.extend(20)
            attn(x[:, :20], cache=cache)
            for t in range(20, 24):
                cache.extend(1)
                out = module(x[:, t : t + 1].detach(), cache=cache)
            results.append(out)
    assert_bit_equal(*results)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_no_host_synchronisation(qk_norm):
    """Tensors without data can take every path: nothing is read back to the host."""
    attn, cache = make(device="meta", qk_norm=qk_norm), make_cache(device="meta")
    with torch.no_grad():
        for n in (20, 20, 1):
            cache.extend(n)
            assert attn(torch.empty(2, n, 48, device="meta"), cache=cache).shape == (2, n, 48)


def test_shared_tables_and_autocast():
    rotary = RotaryEmbedding(16, 64)
    attn = make(rotary_emb=rotary, initializer_range=0.2)
    assert attn.rotary_emb is rotary
    x = tokens(2, 20, 48)
    plain = attn(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.detach().float(), plain, rtol=0, atol=0.03 * float(plain.abs().max()))
    shifted = attn(x, torch.arange(20).expand(2, -1) + 9).detach()
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True, "sinks": True, "qkv_bias": True}], ids=["plain", "full"])
def test_initialisation(initialisation, kwargs):
    attn = initialisation(lambda **factory: make(**kwargs, **factory))
    assert "window=(9, 0)" in repr(attn)
    assert not kwargs or (attn.q_norm.weight.eq(1).all() and attn.sinks.eq(0).all() and attn.q_proj.bias.eq(0).all())


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"hidden_size": 0}, "hidden_size must be an int >= 1, got 0"),
        ({"num_heads": 0}, "num_heads must be an int >= 1, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be an int >= 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads must be a divisor of num_heads 4, got 3"),
        ({"num_heads": 5}, "head_dim must be given where 5 heads do not divide 48, got None"),
        ({"head_dim": 0}, "head_dim must be an int >= 1, got 0"),
        ({"window": (-2, 0)}, r"window must be \(left, right\), each >= 0 or -1 for unbounded, got \(-2, 0\)"),
        ({"window": (1,)}, r"window must be \(left, right\)"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
        ({"softcap": -1.0}, r"softcap must be 0 \(off\) or positive, got -1.0"),
        ({"rotary_dim": 14}, "rotary_dim must be at most head_dim 12, got 14"),
        ({"rotary_emb": RotaryEmbedding(16, 8)}, "rotary_emb must be of dim at most 12, got 16"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=f"tilefuse.nn.WindowAttention: {message}"):
        WindowAttention(**{"hidden_size": 48, "num_heads": 4} | kwargs)


def test_forward_errors():
    attn, x, cache = make(), tokens(2, 4, 48), make_cache()
    bounds = torch.tensor([0, 4])
    cases = [
        (dict(x=x[0]), ValueError, r"x must be \[B, S, 48\], got \[4, 48\] float32"),
        (dict(x=x, cu_seqlens=bounds), ValueError, r"x must be \[T, 48\] with cu_seqlens"),
        (dict(x=x.int()), TypeError, "x must be float32"),
        (dict(x=x, cache=cache), ValueError, r"x must be announced by cache.extend\(S\) first"),
        (dict(x=x[0], cu_seqlens=bounds, cache=cache), ValueError, "cu_seqlens must be None with a cache"),
        (dict(x=x, cache=object()), ValueError, "cache must be a PagedKVCache"),
        (dict(x=x, cache=make_cache(head_dim=8)), ValueError, "cache must be of num_kv_heads and head_dim"),
        (dict(x=x, cache=make_cache(v_head_dim=8)), ValueError, "cache must be of num_kv_heads and head_dim"),
        (dict(x=x, cache=make_cache(dtype=torch.bfloat16)), TypeError, "cache must be of dtype float32 or float8"),
        (dict(x=x, cache=make_cache(device="meta")), ValueError, "cache must be on the device of x"),
        (dict(x=x, positions=torch.zeros(2, 4), cache=cache), ValueError, "positions must be None with a cache"),
    ]
    with torch.no_grad():
        for kwargs, error, message in cases:
            with pytest.raises(error, match=f"tilefuse.nn.WindowAttention: {message}"):
                attn(**kwargs)
        with pytest.raises(ValueError, match=r"window must be \(left, 0\) with a cache, got \(3, 3\)"):
            make(window=(3, 3))(x, cache=cache)
        cache.extend(4)
        with pytest.raises(ValueError, match="layer_idx must be below the cache's num_layers 1, got 1"):
            make(layer_idx=1)(x, cache=cache)
    with pytest.raises(RuntimeError, match="requires grad"):
        attn(x, cache=cache)

    class Unknown:
        model_type = "bert"

    with pytest.raises(ValueError, match="from_config: config must be of type llama"):
        WindowAttention.from_config(Unknown())
    assert tilefuse.window_from("hf", 10) == (9, 0)
