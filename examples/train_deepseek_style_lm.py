"""A DeepSeek-style byte-level language model: latent attention, and experts that are balanced without a loss.

Trains on ``lighthouse.txt`` (or ``--text FILE``), saves checkpoints and a plot of the loss to ``--out``, and writes a
sample through the paged decode. ``--resume`` goes on where the last checkpoint stands.

    python examples/train_deepseek_style_lm.py --out run
"""

import argparse
import contextlib
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from tilefuse.nn import MoE, MultiheadLatentAttention, PagedLatentCache, RotaryEmbedding

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LATENT, ROPE = 64, 16
PROMPT = "Day 301. Wind from the "


class Block(nn.Module):
    def __init__(self, width: int, layer: int, rotary: RotaryEmbedding):
        super().__init__()
        self.attn = MultiheadLatentAttention(
            width, width // 32, kv_lora_rank=LATENT, qk_nope_head_dim=32, qk_rope_head_dim=ROPE, v_head_dim=32,
            rotary_emb=rotary, layer_idx=layer,
        )  # fmt: skip
        self.moe = MoE(
            width, width, num_experts=8, top_k=2, score="sigmoid", correction_bias=True, num_shared_experts=1
        )
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x, cache=None):
        x = x + self.attn(self.norm1(x), cache=cache)
        return x + self.moe(self.norm2(x))


class LanguageModel(nn.Module):
    def __init__(self, width: int, layers: int, max_length: int):
        super().__init__()
        rotary = RotaryEmbedding(ROPE, max_length, interleaved=True)
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, i, rotary) for i in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens, cache=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cache)
        return F.linear(self.norm(x), self.embed.weight)


def batch(data, args, step, device):
    """Random windows that depend on seed and step only, so that a resumed run sees what an unbroken one sees."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    start = torch.randint(len(data) - args.length, (args.batch, 1), generator=generator)
    rows = data[start + torch.arange(args.length + 1)].to(device)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def sample(model, prompt, count, temperature, seed, device, dtype):
    model.eval()
    tokens = torch.tensor([list(prompt.encode())], device=device)
    cache = PagedLatentCache(
        1, tokens.shape[1] + count, kv_lora_rank=LATENT, qk_rope_head_dim=ROPE, num_layers=len(model.blocks),
        dtype=dtype, device=device,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed)
    out, new = [tokens], tokens
    for _ in range(count):
        cache.extend(new.shape[1])
        logits = model(new, cache)[:, -1].float()
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        out.append(new)
    return bytes(torch.cat(out, 1)[0].tolist()).decode(errors="replace")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("lighthouse.txt"))
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder for checkpoint.pt and loss.png")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--stop", type=int, help="stop after this step of --steps, to be resumed later")
    for name, value in (
        ("steps", 300), ("batch", 8), ("length", 256), ("width", 128), ("layers", 3), ("save-every", 50),
        ("seed", 0), ("sample", 240),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--lr", type=float, default=3e-3, help="default 3e-3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device, console = torch.device(args.device), Console()
    bf16 = device.type == "cuda"
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    data = torch.tensor(list(args.text.read_bytes()))
    split = len(data) * 9 // 10
    if len(data) - split <= args.length:
        parser.error(f"{args.text} is too short: a tenth of it must be longer than --length")
    torch.manual_seed(args.seed)
    model = LanguageModel(args.width, args.layers, args.length).to(device)
    decay = {p: p.dim() > 1 for p in model.parameters()}
    groups = [{"params": [p for p in decay if decay[p] is d], "weight_decay": 0.1 * d} for d in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    first, last, losses, checked = 0, min(args.steps, args.stop or args.steps), [], []
    checkpoint = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, losses, checked = state["step"], state["losses"], state["checked"]
        console.print(f"resumed from step {first}")
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} bytes of text, {device}")

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=args.steps, completed=first)
        for step in range(first, last):
            model.train()
            for group in optimizer.param_groups:
                # warm-up, then a straight line down
                group["lr"] = args.lr * min((step + 1) / 20, 1 - 0.9 * step / args.steps)
            inputs, targets = batch(data[:split], args, step, device)
            with autocast:
                loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for block in model.blocks:
                block.moe.update_bias(1e-3)
            losses.append(float(loss.detach()))
            if (step + 1) % args.save_every == 0 or step + 1 == last:
                model.eval()
                with torch.no_grad(), autocast:
                    inputs, targets = batch(data[split:], args, 0, device)
                    held_out = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
                checked.append((step + 1, float(held_out)))
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(state | {"losses": losses, "checked": checked}, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").replace(checkpoint)
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=1, label="training text")
    ax.plot(*zip(*checked), "o-", color="tab:orange", label="held-out text")
    ax.set(xlabel="step", ylabel="cross entropy per byte (nats)", title=f"{args.layers} layers of width {args.width}")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(args.out / "loss.png", dpi=120)
    done = f"loss {losses[-1]:.3f}, held-out {checked[-1][1]:.3f}; {checkpoint}, {args.out / 'loss.png'}\n"
    # a path that is broken over two lines cannot be copied
    console.print(done, soft_wrap=True)
    with autocast:
        dtype = torch.bfloat16 if bf16 else torch.float32
        # positions past the training length would be new to the model
        count = min(args.sample, args.length - len(PROMPT))
        text = sample(model, PROMPT, count, 0.5, args.seed, device, dtype)
    console.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
