"""From the raw down-projection to latent rows: norm of one part, rotary embedding of the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse

from ..harness import Case, compiled, normal
from ..shapes import DEEPSEEK_V3 as M

EPS = 1e-6
WIDTH = M.kv_lora_rank + M.rope_dim


def rotate(x, cos, sin):
    """Interleaved pairs through complex numbers, as DeepSeek's own code does it; cos and sin of x's rows."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def rotate_reals(x, cos, sin):
    """The same without complex numbers, which torch.compile hands to eager."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


def norm(x, weight):
    """Hugging Face's DeepseekV3RMSNorm."""
    wide = x.float()
    return weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def rows(kv_a, weight, cos, sin, rotate=rotate):
    latent, pe = kv_a.split((M.kv_lora_rank, M.rope_dim), -1)
    return torch.cat((norm(latent, weight), rotate(pe, cos, sin)), -1)


def eager(kv_a, weight, cos, sin):
    return rows(kv_a, weight, cos[: kv_a.shape[0]], sin[: kv_a.shape[0]])


def eager_reals(kv_a, weight, cos, sin):
    return rows(kv_a, weight, cos[: kv_a.shape[0]], sin[: kv_a.shape[0]], rotate_reals)


def inputs_of(tokens: int):
    def inputs(device, generator):
        kv_a = normal((tokens, WIDTH), torch.bfloat16, device, generator)
        weight = normal((M.kv_lora_rank,), torch.bfloat16, device, generator, 0.1) + 1
        return kv_a, weight, *tilefuse.rope_tables(M.rope_dim, tokens, device=device)

    return inputs


def cases() -> Iterator[Case]:
    for tokens in (4096, 32768):
        for mode in ("forward", "backward"):
            yield Case(
                op="mla_compress_kv",
                name=f"{M.name}, {tokens} tokens",
                dtype="bfloat16",
                mode=mode,
                inputs=inputs_of(tokens),
                oracle_inputs=inputs_of(1024),
                run=tilefuse.mla_compress_kv,
                peers={"eager": eager, "torch.compile": compiled(eager_reals)},
                grads=(0, 1),
                bytes=(2 if mode == "forward" else 3) * 2 * tokens * WIDTH + tokens * M.rope_dim * 4,
                suite="quick" if tokens == 4096 and mode == "forward" else "full",
                devices=("cpu", "cuda") if tokens == 4096 else ("cuda",),
            )
