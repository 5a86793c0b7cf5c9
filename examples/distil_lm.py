"""Distils the language model of train_deepseek_style_lm.py into one of half its size, from its likeliest next bytes.

Trains a teacher on ``lighthouse.txt`` (or takes that of an earlier run, ``--teacher DIR``), then two students of half
its width and depth, which see the first ``--bytes`` of the text alone: from the same weights, on the same windows, for
the same steps. One learns the bytes; the other also what the teacher, who has read more, holds for the ``--topk`` most
likely ones (``nn.DistillationLoss``). Prints what they make of text that nobody has seen and how far from the teacher
they are, and plots it to ``--out``.

    python examples/distil_lm.py --out distilled
"""

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from train_deepseek_style_lm import LanguageModel, windows

from tilefuse.nn import DistillationLoss


def train(model, loss_of, text, held_out, args, steps):
    """Held-out losses, [(step, cross-entropy)], of a model trained with ``loss_of(model, rows)``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    checked, start = [], time.time()
    for step in range(steps):
        loss = loss_of(model.train(), windows(text, args, seed=step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for block in model.blocks:
            block.moe.update_bias(1e-3)
        if (step + 1) % args.check_every == 0 or step + 1 == steps:
            checked.append((step + 1, distance(model, None, held_out, args)))
            print(f"  step {step + 1}: held-out {checked[-1][1]:.3f}, {time.time() - start:.0f} s", flush=True)
    return checked


@torch.no_grad()
def distance(model, teacher, held_out, args):
    """Mean cross-entropy of held-out bytes, or the mean divergence from the teacher's distributions of them."""
    total, batches = 0.0, 4
    for seed in range(batches):
        rows = windows(held_out, args, seed)
        logp = model.eval()(rows[:, :-1]).log_softmax(-1)
        if teacher is None:
            total += nn.functional.nll_loss(logp.flatten(0, 1), rows[:, 1:].flatten()).item()
        else:
            right = teacher.eval()(rows[:, :-1]).log_softmax(-1)
            total += (right.exp() * (right - logp)).sum(-1).mean().item()
    return total / batches


def from_text(model, rows):
    return model.head([model.hidden(rows[:, :-1])], rows[:, 1:])


def from_teacher(teacher, args):
    """As much of the teacher as of the text."""
    criterion = DistillationLoss()

    def loss_of(model, rows):
        with torch.no_grad():
            listed = teacher.eval()(rows[:, :-1]).log_softmax(-1).topk(args.topk)
        states = model.hidden(rows[:, :-1])
        text = model.head([states], rows[:, 1:])
        return 0.5 * text + 0.5 * criterion(states, model.head.weight, listed)

    return loss_of


def plot(curves, path):
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, checked in curves.items():
        ax.plot(*zip(*checked), "o-", label=name)
    ax.set(xlabel="step", ylabel="held-out cross entropy per byte (nats)")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__).with_name("lighthouse.txt"))
    parser.add_argument(
        "--out", type=Path, default=Path("distilled"), help="folder for teacher.pt, student.pt, distilled.png"
    )
    parser.add_argument("--teacher", type=Path, help="the --out of an earlier run, whose teacher is taken")
    sizes = {"width": 128, "layers": 2, "length": 128, "batch": 8, "teacher-steps": 300, "steps": 150, "topk": 16}
    for name, value in (sizes | {"bytes": 1500, "check-every": 25}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    text, held_out = torch.tensor(list(args.text.read_bytes())).tensor_split([args.text.stat().st_size * 9 // 10])
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    teacher = LanguageModel(args.width, args.layers, args.length).to(args.device)
    if args.teacher:
        teacher.load_state_dict(torch.load(args.teacher / "teacher.pt", map_location=args.device))
    else:
        print("teacher")
        train(teacher, from_text, text, held_out, args, args.teacher_steps)
        torch.save(teacher.state_dict(), args.out / "teacher.pt")
    curves, students = {}, {}
    for name, loss_of in (("text", from_text), ("text and teacher", from_teacher(teacher, args))):
        print(f"student of {name}")
        torch.manual_seed(1)
        students[name] = LanguageModel(args.width // 2, max(1, args.layers // 2), args.length).to(args.device)
        curves[name] = train(students[name], loss_of, text[: args.bytes], held_out, args, args.steps)
    plot(curves, args.out / "distilled.png")
    torch.save(students["text and teacher"].state_dict(), args.out / "student.pt")
    print(f"\n{'model':18} parameters  held-out  from the teacher")
    for name, model in ({"teacher": teacher} | students).items():
        count = sum(p.numel() for p in (*model.embed.parameters(), *model.blocks.parameters()))
        print(
            f"{name:18} {count:10,}  {distance(model, None, held_out, args):8.3f}"
            f"  {distance(model, teacher, held_out, args):16.3f}"
        )


if __name__ == "__main__":
    main()
