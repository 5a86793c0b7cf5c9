import pytest
import torch

import tilefuse
from tilefuse.nn import MultiheadLatentAttention, PagedLatentCache, RotaryEmbedding
from tilefuse.testing import assert_bit_equal, assert_close

SIZES = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0, "beta_fast": 32}
YARN |= {"mscale_all_dim": 0.7, "beta_slow": 1, "rope_theta": 1000.0}


def make(q_lora_rank=24, **kwargs):
    return MultiheadLatentAttention(48, 3, q_lora_rank=q_lora_rank, **SIZES | kwargs)


def make_cache(batch=2, max_length=64, **kwargs):
    options = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "page_size": 8, "dtype": torch.float32}
    return PagedLatentCache(batch, max_length, **options | kwargs)


def tokens(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hf_attention(version, q_lora_rank, scaling, bias=False):
    import transformers

    config = getattr(transformers, f"DeepseekV{version}Config")(
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=q_lora_rank,
        attention_bias=bias,
        rope_parameters=scaling or {"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=128,
        attn_implementation="eager",
        **SIZES,
    )
    if version == 3:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention as Attention
    else:
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention as Attention
    return config, Attention(config, 0)


def hf_run(config, rotary, lengths=None):
    """Theirs on the float32 tables of ours, so that the oracle has the same operands."""

    def run(module, x):
        length = x.shape[1]
        cos, sin = rotary.cos[:length], rotary.sin[:length]
        if config.model_type == "deepseek_v2":
            embeddings = torch.complex(cos, sin)[None]
        else:
            embeddings = tuple(torch.cat([t, t], -1)[None].to(x.dtype) for t in (cos, sin))
        mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
        return module(x, position_embeddings=embeddings, attention_mask=mask)[0]

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "version,q_lora_rank,scaling,bias", [(3, 24, YARN, True), (3, None, None, False), (2, 24, None, False)]
)
def test_against_hugging_face(hf, version, q_lora_rank, scaling, bias, dtype):
    config, theirs = hf_attention(version, q_lora_rank, scaling, bias)
    ours = MultiheadLatentAttention.from_config(config)
    assert ours.softmax_scale == pytest.approx(theirs.scaling, rel=1e-12)
    hf(ours, theirs, tokens(2, 33, 48), hf_run(config, ours.rotary_emb), dtype=dtype)


def test_tables_are_those_of_hugging_face(hf):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    config, _ = hf_attention(3, 24, YARN)
    cos, sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.arange(128)[None])
    rotary = MultiheadLatentAttention.from_config(config).rotary_emb
    torch.testing.assert_close(rotary.cos, cos[0, :, :4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotary.sin, sin[0, :, :4], rtol=1e-5, atol=1e-5)


# tokens per call: prefill, chunks, decode; up to 16 are absorbed
SCHEDULES = {
    "whole": [40],
    "chunks": [17, 20, 3],
    "decode": [18, *[1] * 22],
    "from_nothing": [1] * 40,
    "speculative": [4, 16, 20],
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cache_equals_full_forward(schedule, dtype):
    attn = make(rope_scaling=YARN, prefix_chunk=16, dtype=dtype, initializer_range=0.2).eval()
    x = tokens(2, 40, 48, dtype=dtype)
    cache = make_cache(dtype=dtype, page_size=6)
    with torch.no_grad():
        plain = attn(x)
        exact = make(rope_scaling=YARN, dtype=torch.float64)
        exact.load_state_dict(attn.state_dict())
        exact = exact(x.double())
        outs, start = [], 0
        for n in SCHEDULES[schedule]:
            cache.extend(n)
            outs.append(attn(x[:, start : start + n], cache=cache))
            start += n
    # plain rounds keys, values and latents as every eager implementation does
    tiny = 2**-20 * float(exact.abs().max()) if dtype == torch.float32 else None
    assert_close(torch.cat(outs, 1), exact, plain, tiny=tiny)
    assert cache.seq_lens.tolist() == [40, 40]


def test_fp8_cache():
    """Chunked prefill and decode read the same quantised rows, which are close to the exact ones."""
    attn = make(kv_lora_rank=128, initializer_range=0.1).eval()
    x = tokens(2, 40, 48)
    with torch.no_grad():
        plain = attn(x)
        results = []
        for schedule in ([20, 20], [20, *[1] * 20]):
            cache, start = make_cache(kv_lora_rank=128, layout="fp8"), 0
            assert cache.rows.shape[-1] == 128 + 4 + 16 and cache.rows.dtype == torch.uint8
            outs = []
            for n in schedule:
                cache.extend(n)
                outs.append(attn(x[:, start : start + n], cache=cache))
                start += n
            results.append(torch.cat(outs, 1))
    spread = plain.std()
    assert (results[0] - plain).abs().max() < 0.15 * spread
    assert (results[1] - plain).abs().max() < 0.15 * spread
    # the first chunk does not read the cache
    torch.testing.assert_close(results[0][:, :20], plain[:, :20], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device_lengths", [False, True])
@pytest.mark.parametrize("absorb_tokens", [1, 16])
def test_ragged_batch(device_lengths, absorb_tokens):
    """Right-padded chunks of different lengths, and a sequence that rests, equal each sequence alone."""
    attn = make(absorb_tokens=absorb_tokens, prefix_chunk=8, initializer_range=0.2).eval()
    lengths = [[9, 20, 3], [12, 0, 5], [1, 1, 0], [0, 1, 1]]
    sequences = [tokens(sum(step[b] for step in lengths), 48, seed=b) for b in range(3)]
    cache = make_cache(batch=3)
    outs, done = [[] for _ in range(3)], [0, 0, 0]
    with torch.no_grad():
        alone = [attn(s[None])[0] for s in sequences]
        for step in lengths:
            width = max(step)
            x = torch.full((3, width, 48), 7.0)
            for b, n in enumerate(step):
                x[b, :n] = sequences[b][done[b] : done[b] + n]
                done[b] += n
            cache.extend(width, torch.tensor(step) if device_lengths else step)
            y = attn(x, cache=cache)
            assert y.isfinite().all()
            for b, n in enumerate(step):
                outs[b].append(y[b, :n])
    for b in range(3):
        torch.testing.assert_close(torch.cat(outs[b]), alone[b], rtol=2e-5, atol=2e-6)
    assert cache.seq_lens.tolist() == done


def test_packed_equals_separate():
    attn = make(initializer_range=0.2)
    x = tokens(30, 48).requires_grad_()
    bounds = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    packed = attn(x, cu_seqlens=bounds)
    separate = torch.cat([attn(x[None, :11])[0], attn(x[None, 11:])[0]])
    torch.testing.assert_close(packed, separate, rtol=2e-5, atol=2e-6)
    given = attn(x, torch.cat([torch.arange(11), torch.arange(19)]), bounds)
    assert_bit_equal(packed, given)
    (grad,) = torch.autograd.grad(packed.sum(), x)
    assert grad.isfinite().all() and grad.abs().sum() > 0


def test_shared_tables_positions_and_layers():
    rotary = RotaryEmbedding(8, 64, interleaved=True)
    layers = [make(rotary_emb=rotary, layer_idx=i, initializer_range=0.2) for i in range(2)]
    assert layers[0].rotary_emb is layers[1].rotary_emb
    x = tokens(1, 20, 48)
    # scores depend on differences of positions only
    shifted = layers[0](x, torch.arange(20)[None] + 9)
    torch.testing.assert_close(shifted, layers[0](x), rtol=1e-4, atol=1e-5)
    cache = make_cache(batch=1, num_layers=2)
    with torch.no_grad():
        whole = layers[1](layers[0](x))
        outs = []
        for n, part in zip((17, 1, 2), x.split((17, 1, 2), 1)):
            cache.extend(n)
            h = layers[0](part, cache=cache)
            outs.append(layers[1](h, cache=cache))
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mode", ["train", "decode"])
def test_compile(mode):
    attn = make(initializer_range=0.2)
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
    if mode == "train":
        x = tokens(2, 20, 48).requires_grad_()
        want, got = attn(x), compiled(x)
        assert_bit_equal(want, got)
        assert_bit_equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (want, got)))
        return
    x = tokens(2, 24, 48)
    results = []
    with torch.no_grad():
        for module in (attn, compiled):
            cache = make_cache()
            cache.extend(20)
            attn(x[:, :20], cache=cache)
            for t in range(20, 24):
                cache.extend(1)
                out = module(x[:, t : t + 1], cache=cache)
            results.append(out)
    assert_bit_equal(*results)


def test_no_host_synchronisation():
    """Tensors without data can take every path: nothing is read back to the host."""
    attn, cache = make(device="meta", prefix_chunk=16), make_cache(device="meta")
    with torch.no_grad():
        for n in (20, 20, 1, 3):
            cache.extend(n, torch.ones(2, dtype=torch.int32, device="meta") if n == 3 else None)
            assert attn(torch.empty(2, n, 48, device="meta"), cache=cache).shape == (2, n, 48)


@pytest.mark.gpu
def test_decode_in_a_cuda_graph():
    """One captured step serves all steps: extend moves what the graph reads, in place."""
    dtype = torch.bfloat16
    attn = make(dtype=dtype, device="cuda", initializer_range=0.2)
    exact = make(dtype=torch.float64)
    exact.load_state_dict(attn.state_dict())
    x = tokens(2, 26, 48, dtype=dtype)
    with torch.no_grad():
        exact = exact(x.double())
        x = x.cuda()
        plain, static, cache = attn(x), x[:, 20:21].clone(), make_cache(dtype=dtype, device="cuda")
        spare = make_cache(dtype=dtype, device="cuda")
        spare.extend(1)
        attn(static, cache=spare)
        cache.extend(20)
        attn(x[:, :20], cache=cache)
        cache.extend(1)
        graph, outs = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            out = attn(static, cache=cache)
        for t in range(20, 26):
            if t > 20:
                cache.extend(1)
            static.copy_(x[:, t : t + 1])
            graph.replay()
            outs.append(out.clone())
    assert_close(torch.cat(outs, 1), exact[:, 20:], plain[:, 20:])


def test_activation_checkpointing():
    attn, x = make(initializer_range=0.2), tokens(2, 20, 48).requires_grad_()
    results = []
    for call in (attn, lambda x: torch.utils.checkpoint.checkpoint(attn, x, use_reentrant=False)):
        results.append(torch.autograd.grad(call(x).square().sum(), [x, *attn.parameters()]))
    for a, b in zip(*results):
        assert_bit_equal(a, b)


def test_autocast_and_fp8_projections():
    attn = make(initializer_range=0.2)
    x = tokens(2, 20, 48).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert attn.kv_b_proj.weight.grad.dtype == torch.float32
    plain = attn(x).detach()
    torch.testing.assert_close(out.detach().float(), plain, rtol=0, atol=0.03 * float(plain.abs().max()))
    for name in ("q_b_proj", "kv_b_proj", "o_proj"):
        setattr(attn, name, tilefuse.nn.FP8Linear.from_linear(getattr(attn, name)))
    with torch.no_grad():
        quantised = attn(x)
        cache = make_cache()
        cache.extend(4)
        decoded = attn(x[:, :4], cache=cache)
    assert (quantised - plain).abs().max() < 0.2 * plain.abs().max()
    assert (decoded - quantised[:, :4]).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_initialisation(initialisation, q_lora_rank):
    attn = initialisation(lambda **kwargs: make(q_lora_rank, bias=True, max_position_embeddings=32, **kwargs))
    assert attn.o_proj.bias.eq(0).all() and attn.kv_a_layernorm.weight.eq(1).all()
    assert float(attn.o_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"hidden_size": 0}, "hidden_size must be an int >= 1, got 0"),
        ({"num_heads": -1}, "num_heads must be an int >= 1, got -1"),
        ({"q_lora_rank": 0}, "q_lora_rank must be an int >= 1, got 0"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be an int >= 1, got 0"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim must be"),
        ({"v_head_dim": 1.5}, "v_head_dim must be an int >= 1, got 1.5"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, got 7"),
        ({"prefix_chunk": 0}, "prefix_chunk must be an int >= 1, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
        ({"absorb_tokens": 0}, "absorb_tokens must be at least 1, got 0"),
        ({"rotary_emb": RotaryEmbedding(16, 8, interleaved=True)}, "rotary_emb must be of dim 8, got 16"),
        ({"rotary_emb": RotaryEmbedding(8, 8)}, "rotary_emb must be interleaved=True, got False"),
    ],
)
def test_constructor_errors(kwargs, message):
    arguments = {"hidden_size": 48, "num_heads": 3, **SIZES} | kwargs
    with pytest.raises(ValueError, match=f"tilefuse.nn.MultiheadLatentAttention: {message}"):
        MultiheadLatentAttention(**arguments)


def test_forward_errors():
    attn, x = make(), tokens(2, 4, 48)
    cases = [
        (dict(x=x[0]), ValueError, r"x must be \[B, S, 48\], got \[4, 48\] float32"),
        (dict(x=x[..., :47]), ValueError, r"x must be \[B, S, 48\]"),
        (dict(x=x, cu_seqlens=torch.tensor([0, 4])), ValueError, r"x must be \[T, 48\] with cu_seqlens"),
        (dict(x=x.int()), TypeError, "x must be float32"),
        (dict(x=x, positions=torch.arange(4)), ValueError, r"positions must be \[2, 4\]"),
    ]
    cache = make_cache()
    bad = [
        (dict(x=x, cache=cache), ValueError, r"x must be announced by cache.extend\(S\) first"),
        (
            dict(x=x[0], cu_seqlens=torch.tensor([0, 4]), cache=cache),
            ValueError,
            "cu_seqlens must be None with a cache",
        ),
        (dict(x=x, cache=object()), ValueError, "cache must be a PagedLatentCache"),
        (dict(x=x, cache=make_cache(kv_lora_rank=16)), ValueError, "cache must be of kv_lora_rank"),
        (dict(x=x, cache=make_cache(dtype=torch.bfloat16)), TypeError, "cache must be of dtype float32"),
        (dict(x=x, cache=make_cache(device="meta")), ValueError, "cache must be on the device of x"),
        (dict(x=x, positions=torch.zeros(2, 4), cache=cache), ValueError, "positions must be None with a cache"),
    ]
    with torch.no_grad():
        for kwargs, error, message in cases + bad:
            with pytest.raises(error, match=f"tilefuse.nn.MultiheadLatentAttention: {message}"):
                attn(**kwargs)
        cache.extend(4)
        with pytest.raises(ValueError, match=r"x must be \[2, 4, ..\], as cache.extend\(4\) announced"):
            attn(x[:, :3], cache=cache)
        with pytest.raises(ValueError, match="layer_idx must be below the cache's num_layers 1, got 1"):
            make(layer_idx=1)(x, cache=cache)
    with pytest.raises(RuntimeError, match="requires grad"):
        attn(x, cache=cache)
