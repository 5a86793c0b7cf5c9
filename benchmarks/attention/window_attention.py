"""Sliding-window attention: one window, growing sequences; gpt-oss's sinks and grouped heads; windows on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import tilefuse

from ..harness import Case, Peer, compiled, normal
from ..peers import vllm, zentorch
from ..shapes import GPT_OSS_20B, LONGFORMER_BASE

# rows of queries per call of the eager peer, which never holds more than one band of scores
ROWS = 512


def pairs(length: int, left: int, right: int) -> int:
    """Visible (query, key) pairs of one head."""
    inner = length * (1 + left + right)
    return inner - left * (left + 1) // 2 - right * (right + 1) // 2


def band(rows: range, keys: range, left: int, right: int, device: torch.device) -> torch.Tensor:
    """Bool [rows, keys]."""
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None]
    return (j >= i - left) & (j <= i + right)


def eager(left: int, right: int):
    """scaled_dot_product_attention of each block of rows over the keys that it can see."""

    def run(q, k, v):
        length, grouped = q.shape[1], q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = []
        for start in range(0, length, ROWS):
            rows = range(start, min(start + ROWS, length))
            keys = range(max(start - left, 0), min(rows.stop + right, length))
            mask = band(rows, keys, left, right, q.device)
            part = slice(keys.start, keys.stop)
            out.append(
                F.scaled_dot_product_attention(
                    q[:, :, start : rows.stop], k[:, :, part], v[:, :, part], mask, enable_gqa=grouped
                )
            )
        return torch.cat(out, 2).transpose(1, 2)

    return run


def heads_first(*tensors):
    return tuple(t.transpose(1, 2).contiguous() for t in tensors)


def heads_last(out):
    return out.transpose(1, 2)


def masked_sdpa(left: int, right: int) -> Peer:
    """One call with a dense mask, which is built outside of the timing."""

    def prepare(q, k, v):
        everything = range(q.shape[1])
        return *heads_first(q, k, v), band(everything, everything, left, right, q.device)

    def run(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])

    return Peer(run, prepare=prepare, post=heads_last)


def flex(left: int, right: int, *, sinks: bool = False, devices: tuple[str, ...] = ("cpu", "cuda")) -> Peer:
    """Compiled FlexAttention; its block mask is built outside of the timing."""

    def prepare(q, k, v, *rest):
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b, h, i, j):
            return (j >= i - left) & (j <= i + right)

        mask = create_block_mask(visible, None, None, q.shape[1], k.shape[1], device=q.device)
        return *heads_first(q, k, v), *rest, mask

    def load():
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        if not sinks:
            return lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

        def with_sinks(q, k, v, sink, mask):
            out, aux = flex_attention(
                q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True)
            )
            return (out * torch.sigmoid(aux.lse - sink[None, :, None])[..., None]).to(out.dtype)

        return with_sinks

    return Peer(load=load, prepare=prepare, post=heads_last, compile=True, devices=devices)


def flash_attn(left: int, right: int) -> Peer:
    def load():
        from flash_attn import flash_attn_func

        return lambda q, k, v: flash_attn_func(q, k, v, window_size=(left, right))

    return Peer(load=load, devices=("cuda",), package="flash-attn")


def serving(left: int) -> dict[str, Peer]:
    """The kernels that serve one prompt on a CPU; their windows count the row's own key."""
    return {
        "vLLM": vllm.cpu_attention_with_kv_cache(causal=True, window=left + 1),
        "SGLang": vllm.extend_attention_cpu(window=left + 1),
    }


def plain(left: int, right: int):
    """Hugging Face's eager attention, gpt-oss's with sinks as one more column of scores; by blocks of rows."""

    def run(q, k, v, sinks=None):
        length, groups = q.shape[1], q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        out = []
        for start in range(0, length, ROWS):
            rows = range(start, min(start + ROWS, length))
            keys = range(max(start - left, 0), min(rows.stop + right, length))
            scores = q[:, :, start : rows.stop] @ k[:, :, keys.start : keys.stop].mT * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~band(rows, keys, left, right, q.device), float("-inf"))
            if sinks is not None:
                column = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
                scores = torch.cat((scores, column), -1)
            probs = scores.softmax(-1, dtype=torch.float32)[..., : len(keys)].to(q.dtype)
            out.append(probs @ v[:, :, keys.start : keys.stop])
        return torch.cat(out, 2).transpose(1, 2)

    return run


class Recomputed(torch.autograd.Function):
    """Attention whose backward recomputes the probabilities and takes ``out`` as the forward stored it, in bfloat16.

    Every flash kernel does so, and rows with few keys show it. In float64 this is the oracle on the backward's own
    operands, in bfloat16 the plain computation.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = ((q @ k.mT).to(wide) * scale).masked_fill(~mask, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        out = (scores - lse).exp().to(q.dtype) @ v
        ctx.save_for_backward(q, k, v, out.bfloat16(), lse, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, mask = ctx.saved_tensors
        scores = ((q @ k.mT).to(lse.dtype) * ctx.scale).masked_fill(~mask, float("-inf"))
        probs = (scores - lse).exp()
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
        inner = (probs * ((grad @ v.mT).to(lse.dtype) - delta) * ctx.scale).to(q.dtype)
        return inner @ k, inner.mT @ q, probs.to(q.dtype).mT @ grad, None, None


def recomputed(q, k, v, mask, scale=None):
    """[B, S, H, D] in and out; mask is bool and broadcasts to [B, H, Sq, Sk]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return Recomputed.apply(q, k, v, mask, scale or q.shape[-1] ** -0.5).transpose(1, 2)


def on_operands(left: int, right: int):
    def run(q, k, v):
        everything = range(q.shape[1])
        return recomputed(q, k, v, band(everything, everything, left, right, q.device))

    return run


def qkv(batch: int, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.bfloat16):
    def inputs(device, generator):
        return tuple(normal((batch, length, h, dim), dtype, device, generator) for h in (heads, kv_heads, kv_heads))

    return inputs


def case(
    name: str,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    left: int,
    right: int,
    *,
    mode: str = "forward",
    small: int = 1024,
    dense: bool = True,
    series: str = "",
    **options,
) -> Case:
    products = 2 if mode == "forward" else 5
    tensors = 2 if mode == "forward" else 4  # of q's and of k's size: q, out | q, out, dout, dq
    peers = {"eager": eager(left, right)}
    # its gradients exist on a GPU only
    peers["FlexAttention"] = flex(left, right, devices=("cpu", "cuda") if mode == "forward" else ("cuda",))
    if dense:
        peers["masked SDPA"] = masked_sdpa(left, right)
    if mode == "forward" and right == 0 and batch == 1:
        peers |= serving(left)
        if left >= length - 1:
            peers["zentorch"] = zentorch.zentorch_sdpa()
    peers["FlashAttention"] = flash_attn(left, right)
    return Case(
        op="window_attention",
        name=name,
        dtype="bfloat16",
        mode=mode,
        inputs=qkv(batch, length, heads, kv_heads, dim),
        oracle_inputs=qkv(1, small, 2 * heads // kv_heads, 2, dim) if length > small else None,
        # lse is the tests' matter: no peer returns the same
        run=lambda q, k, v: tilefuse.window_attention(q, k, v, window=(left, right))[0],
        # SDPA is no plain computation: it keeps as much in float32 as we do
        naive=plain(left, right) if mode == "forward" else on_operands(left, right),
        oracle=None if mode == "forward" else on_operands(left, right),
        # a query's gradient holds the error of its row's delta times a sum of keys
        rows=mode == "forward",
        peers=peers,
        grads=(0, 1, 2),
        bytes=2 * tensors * batch * length * (heads + kv_heads) * dim,
        flops=products * 2 * dim * batch * heads * pairs(length, left, right),
        series=series,
        length=length if series else 0,
        **options,
    )


def with_dense_bias(q, k, v, bias):
    """scaled_dot_product_attention with the bias of every pair as its mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    place = torch.arange(q.shape[2], device=q.device)
    dense = bias[:, place[:, None] - place + bias.shape[1] // 2].to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, dense, scale=1.0).transpose(1, 2)


def flex_bias() -> Peer:
    """Compiled FlexAttention that looks the bias of each pair up."""

    def prepare(q, k, v, bias):
        return *heads_first(q, k, v), bias

    def load():
        from torch.nn.attention.flex_attention import flex_attention

        def attend(q, k, v, bias):
            middle = bias.shape[1] // 2

            def biased(score, b, h, i, j):
                return score + bias[h, i - j + middle]

            return flex_attention(q, k, v, score_mod=biased, scale=1.0)

        return attend

    return Peer(load=load, prepare=prepare, post=heads_last, compile=True)


def t5_cases() -> Iterator[Case]:
    """T5's encoder: full attention with a bias by distance, unscaled; its training step has the bias's gradient."""
    length, heads, dim = 1024, 8, 64

    def inputs(device, generator):
        q, k, v = qkv(1, length, heads, heads, dim)(device, generator)
        # T5's initialisation makes up for the scale that it leaves out
        return q * dim**-0.5, k, v, normal((heads, 2 * length - 1), torch.float32, device, generator)

    for mode in ("forward", "backward"):
        peers = {"eager": with_dense_bias, "torch.compile": compiled(with_dense_bias)}
        if mode == "forward":
            peers["FlexAttention"] = flex_bias()
        tensors, products = (2, 2) if mode == "forward" else (4, 5)
        yield Case(
            op="window_attention",
            name=f"T5, 8 heads, {length} tokens, bias by distance",
            dtype="bfloat16",
            mode=mode,
            inputs=inputs,
            run=lambda q, k, v, bias: tilefuse.window_attention(q, k, v, distance_bias=bias, scale=1.0)[0],
            naive=with_dense_bias,
            peers=peers,
            grads=(0, 1, 2, 3),
            rows=mode == "forward",
            bytes=2 * tensors * 2 * length * heads * dim,
            flops=products * 2 * dim * heads * length * length,
            suite="quick",
        )


def cases() -> Iterator[Case]:
    # the size that issues quote
    growing = "8 heads, D 64, window 512"
    yield case("8 heads, 4096 tokens, window 512", 1, 4096, 8, 8, 64, 511, 0, suite="quick", series=growing)
    yield case("8 heads, 1024 tokens, window 256", 1, 1024, 8, 8, 64, 255, 0, mode="backward", suite="quick")
    # linear growth at a fixed window
    for length in (8192, 16384, 32768, 65536):
        yield case(
            f"8 heads, {length} tokens, window 512",
            1,
            length,
            8,
            8,
            64,
            511,
            0,
            dense=length <= 8192,
            series=growing,
        )

    yield case("8 heads, D 128, 2048 tokens, causal", 1, 2048, 8, 8, 128, 2047, 0)

    yield from t5_cases()

    m = LONGFORMER_BASE
    half = m.window // 2
    yield case(f"{m.name}, bidirectional", 1, 4096, m.heads, m.kv_heads, m.head_dim, half, half)

    for dim in (64, 128):
        for window in (128, 512, 1024, 4096):
            for mode in ("forward", "backward"):
                yield case(
                    f"batch 4, 16 heads, 16384 tokens, D {dim}, window {window}",
                    4,
                    16384,
                    16,
                    16,
                    dim,
                    window - 1,
                    0,
                    mode=mode,
                    dense=False,
                    devices=("cuda",),
                )

    g = GPT_OSS_20B
    for length in (2048, 16384):
        left = g.window - 1

        def inputs(device, generator, length=length):
            sinks = normal((g.heads,), torch.float32, device, generator)
            return *qkv(1, length, g.heads, g.kv_heads, g.head_dim)(device, generator), sinks

        def small(device, generator):
            sinks = normal((16,), torch.float32, device, generator)
            return *qkv(1, 512, 16, 2, g.head_dim)(device, generator), sinks

        yield Case(
            op="window_attention",
            name=f"{g.name}, sinks, {length} tokens",
            dtype="bfloat16",
            inputs=inputs,
            oracle_inputs=small,
            run=lambda q, k, v, sinks, left=left: tilefuse.window_attention(q, k, v, sinks, window=(left, 0))[0],
            peers={"eager": plain(left, 0), "FlexAttention": flex(left, 0, sinks=True), **serving(left)},
            bytes=2 * 2 * length * (g.heads + g.kv_heads) * g.head_dim,
            flops=2 * 2 * g.head_dim * g.heads * pairs(length, left, 0),
            devices=("cpu", "cuda") if length <= 2048 else ("cuda",),
        )
