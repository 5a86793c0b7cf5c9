"""Patch a Hugging Face model with tilefuse and generate, stock against patched.

    python examples/patch_and_generate.py                                   # tiny model, random weights, offline
    python examples/patch_and_generate.py --model Qwen/Qwen3-0.6B --prompt "The capital of France is"

Prints what was patched, whether both write the same tokens, and the time of each.
"""

import argparse
import os
import time

import torch

from tilefuse.integrations.transformers import patch, unpatch


def random_model(kind: str, layers: int) -> torch.nn.Module:
    """A small model with random weights: enough to see the parts that are swapped, and their speed."""
    import transformers

    sizes = {
        "hidden_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
        "pad_token_id": 0,
    }
    configs = {
        "qwen3": lambda: transformers.Qwen3Config(intermediate_size=512, **sizes),
        "mixtral": lambda: transformers.MixtralConfig(intermediate_size=256, num_local_experts=8, **sizes),
        "gpt-oss": lambda: transformers.GptOssConfig(
            intermediate_size=256, num_local_experts=8, num_experts_per_tok=2, sliding_window=64, **sizes
        ),
        "deepseek-v3": lambda: transformers.DeepseekV3Config(
            intermediate_size=512,
            moe_intermediate_size=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            **{**sizes, "num_key_value_heads": 8, "head_dim": 16},
        ),
    }
    if kind not in configs:
        raise SystemExit(f"--kind must be one of {', '.join(configs)}, got {kind!r}")
    return transformers.AutoModelForCausalLM.from_config(configs[kind]())


def generate(model: torch.nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int) -> tuple[torch.Tensor, float]:
    """Greedy tokens, and the best time of three runs after a first one that compiles kernels."""
    times = []
    for _ in range(4):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return out[:, inputs["input_ids"].shape[1] :], min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a checkpoint; without it: random weights, offline")
    parser.add_argument("--kind", default="qwen3", help="without --model: qwen3, mixtral, gpt-oss or deepseek-v3")
    parser.add_argument("--layers", type=int, default=4, help="without --model: number of layers")
    parser.add_argument("--prompt", default="Sparse attention is", help="with --model: the text to continue")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="without --model: length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32" if not torch.cuda.is_available() else "bfloat16")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    if args.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = None
    torch.manual_seed(0)
    if args.model is None:
        model = random_model(args.kind, args.layers)
        ids = torch.randint(3, model.config.vocab_size, (1, args.prompt_tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        inputs = dict(tokenizer(args.prompt, return_tensors="pt"))
    model = model.to(device, dtype).eval()
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

    stock, stock_time = generate(model, inputs, args.new_tokens)
    print(patch(model))
    patched, patched_time = generate(model, inputs, args.new_tokens)
    unpatch(model)

    same = int((stock == patched).int().cumprod(-1).sum())
    print(f"\n{args.new_tokens} new tokens on {device}, {args.dtype}")
    print(f"  stock    {stock_time * 1e3:8.1f} ms  {args.new_tokens / stock_time:8.1f} tokens/s")
    print(f"  patched  {patched_time * 1e3:8.1f} ms  {args.new_tokens / patched_time:8.1f} tokens/s")
    print(f"  the first {same} of {args.new_tokens} tokens are the same")
    if same < args.new_tokens:
        # two logits that rounding cannot tell apart; everything after the first difference is another text
        print("  (where two tokens are nearly tied, the rounding of either side decides)")
    if tokenizer is not None:
        print(f"\n{args.prompt}{tokenizer.decode(patched[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
