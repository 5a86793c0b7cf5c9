"""A DeepSeek-style byte-level language model: latent attention, experts balanced without a loss, two bytes predicted.

As in DeepSeek-V3 one more block predicts the byte after the next one through the same head, and counts 0.3 in the loss
(``tilefuse.nn.MTPLoss``); writing text does without it. Trains on ``lighthouse.txt`` (or ``--text FILE``), saves
checkpoints and a plot of the loss to ``--out``, and writes a sample through the paged decode. ``--resume`` goes on
where the checkpoint in ``--out`` stands.

    python examples/train_deepseek_style_lm.py --out run
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from tilefuse.nn import MoE, MTPLoss, MultiheadLatentAttention, PagedLatentCache, RMSNorm, RotaryEmbedding

LATENT, ROPE = 64, 16
PROMPT = "Day 301. Wind from the "


class Block(nn.Module):
    def __init__(self, width, layer, rotary):
        super().__init__()
        self.attn = MultiheadLatentAttention(
            width,
            width // 32,
            kv_lora_rank=LATENT,
            qk_nope_head_dim=32,
            qk_rope_head_dim=ROPE,
            v_head_dim=32,
            rotary_emb=rotary,
            layer_idx=layer,
        )
        self.moe = MoE(
            width, width, num_experts=8, top_k=2, score="sigmoid", correction_bias=True, num_shared_experts=1
        )
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)

    def forward(self, x, cache=None):
        x = x + self.attn(self.norm1(x), cache=cache)
        return x + self.moe(self.norm2(x))


class NextButOne(nn.Module):
    """States that predict one byte further, from the model's states and the bytes that come next."""

    def __init__(self, width, layer, rotary):
        super().__init__()
        self.norm_states, self.norm_embedded, self.norm = RMSNorm(width), RMSNorm(width), RMSNorm(width)
        self.project = nn.Linear(2 * width, width, bias=False)
        self.block = Block(width, layer, rotary)

    def forward(self, states, embedded):
        x = self.project(torch.cat([self.norm_states(states), self.norm_embedded(embedded)], -1))
        return self.norm(self.block(x))


class LanguageModel(nn.Module):
    def __init__(self, width, layers, max_length):
        super().__init__()
        rotary = RotaryEmbedding(ROPE, max_length, interleaved=True)
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, i, rotary) for i in range(layers))
        self.norm = RMSNorm(width)
        self.further = NextButOne(width, layers, rotary)
        self.head = MTPLoss(width, 256, mtp_weight=0.3)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def hidden(self, ids, cache=None):
        """States [B, S, width] of ids [B, S]; ``self.head`` makes logits or losses of them."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cache)
        return self.norm(x)

    def forward(self, ids, cache=None):
        return self.head.logits(self.hidden(ids, cache)).float()

    def update_biases(self, rate):
        for block in (*self.blocks, self.further.block):
            block.moe.update_bias(rate)

    def loss(self, rows):
        """Of rows [B, S + 1] of ids: mean cross-entropy of the next id and, in training, of the one after it."""
        ids, target = rows[:, :-1], rows[:, 1:]
        states = [self.hidden(ids)]
        if self.training:
            states.append(self.further(states[0], self.embed(target)))
        return self.head(states, target)


def windows(data, args, seed):
    """Random rows [batch, length + 1] of data: the same ones for the same seed, resumed or not."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(len(data) - args.length, (args.batch, 1), generator=generator)
    return data[start + torch.arange(args.length + 1)].to(args.device)


@torch.no_grad()
def generate(model, ids, count, *, temperature=1.0, generator=None, dtype=torch.float32):
    """The next ids [B, count] after ids [B, S], through the paged cache; with a temperature of 0 the likeliest ones."""
    cache = PagedLatentCache(
        len(ids),
        ids.shape[1] + count,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROPE,
        num_layers=len(model.blocks),
        dtype=dtype,
        device=ids.device,
    )
    out, new = [], ids
    for _ in range(count):
        cache.extend(new.shape[1])
        logits = model(new, cache)[:, -1]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        out.append(new)
    return torch.cat(out, 1)


def plot(losses, checked, path):
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=1, label="training text, both bytes")
    ax.plot(*zip(*checked), "o-", color="tab:orange", label="held-out text, next byte")
    ax.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("lighthouse.txt"))
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder for checkpoint.pt and loss.png")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, up to --steps")
    sizes = {"steps": 300, "batch": 8, "length": 256, "width": 128, "layers": 3, "save-every": 50, "sample": 240}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    autocast = torch.autocast(args.device.split(":")[0], dtype, enabled=dtype is torch.bfloat16)

    text = torch.tensor(list(args.text.read_bytes()))
    train, held_out = text.tensor_split([len(text) * 9 // 10])
    if len(held_out) <= args.length:
        parser.error(f"{args.text} is too short: a tenth of it must be longer than --length")
    torch.manual_seed(0)
    model = LanguageModel(args.width, args.layers, args.length).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses, checked, checkpoint = [], [], args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        state = torch.load(checkpoint, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses, checked = state["losses"], state["checked"]

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress, autocast:
        progress.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text")
        task = progress.add_task("", total=args.steps, completed=len(losses))
        for step in range(len(losses), args.steps):
            loss = model.train().loss(windows(train, args, seed=step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.update_biases(1e-3)
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                with torch.no_grad():
                    checked.append((step + 1, model.eval().loss(windows(held_out, args, seed=0)).item()))
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"losses": losses, "checked": checked}, checkpoint)
    plot(losses, checked, args.out / "loss.png")
    print(f"loss {losses[-1]:.3f}, held-out {checked[-1][1]:.3f}; {checkpoint}, {args.out / 'loss.png'}\n")
    with torch.no_grad(), autocast:
        # positions past the training length would be new to the model
        count = min(args.sample, args.length - len(PROMPT))
        prompt, generator = torch.tensor([[*PROMPT.encode()]], device=args.device), torch.Generator(args.device)
        written = generate(
            model.eval(), prompt, count, temperature=0.5, generator=generator.manual_seed(0), dtype=dtype
        )
        print(PROMPT + bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
