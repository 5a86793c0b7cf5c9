"""Reinforcement learning with a checkable answer, as DeepSeek-R1 was trained, in small: GRPO on sums.

A byte-level model in the style of DeepSeek first sees some sums of two digits with their answers. From then on it is
only told whether an answer is right: to each sum it samples a group of answers, an answer's advantage is its reward
against those of its group, and ``tilefuse.linear_logprobs`` and ``tilefuse.nn.PolicyLoss`` make the loss. A fifth of
all sums is held out. Saves a plot of the reward to ``--out``.

    python examples/grpo_arithmetic.py --out run
"""

import argparse
import copy
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from train_deepseek_style_lm import LanguageModel, generate

import tilefuse

NEWLINE = ord("\n")
# "3+9=" and "12\n"
PROMPT, ANSWER = 4, 3


def sums():
    """Prompts [100, PROMPT] and answers [100, ANSWER] in bytes, in a random order; newlines fill an answer up."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    prompts = torch.tensor([[*f"{a}+{b}=".encode()] for a, b in pairs])
    answers = torch.tensor([[*f"{a + b}\n\n\n"[:ANSWER].encode()] for a, b in pairs])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return prompts[order], answers[order]


def kept(answers):
    """Which bytes of answers [B, ANSWER] belong to them: up to the first newline, and that one too."""
    newline = answers == NEWLINE
    return newline.cumsum(1) - newline.long() == 0


def rewards(answers, right):
    """1 where an answer is the right one up to its newline, else 0."""
    return ((answers == right) | ~kept(right)).all(1).float()


def answer_logps(model, rows):
    """Log-probability [B, ANSWER] of each byte of the answers in rows [B, PROMPT + ANSWER]."""
    states = model.hidden(rows[:, :-1])[:, PROMPT - 1 :]
    return tilefuse.linear_logprobs(states, model.head.weight, rows[:, PROMPT:])[0]


@torch.no_grad()
def accuracy(model, prompts, right):
    """Share of sums whose likeliest answer is right."""
    return rewards(generate(model, prompts, ANSWER, temperature=0), right).mean().item()


def update(model, optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def warm_up(model, prompts, right, args, generator):
    """Some steps of supervised training, on whole sums with their answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    rows = torch.cat([prompts, right], 1)
    for _ in range(args.warm_up):
        batch = rows[torch.randint(len(rows), (args.batch,), generator=generator)]
        target = torch.where(kept(batch[:, PROMPT:]), batch[:, PROMPT:], -100)
        states = model.hidden(batch[:, :-1])[:, PROMPT - 1 :]
        update(model, optimizer, model.head([states], target))
        model.update_biases(1e-3)


def step_of_grpo(model, reference, optimizer, criterion, prompts, right, args, generator):
    """Samples groups of answers, and learns from their rewards; returns the mean reward and the loss' statistics."""
    which = torch.randint(len(prompts), (args.prompts,), generator=generator).repeat_interleave(args.group)
    answers = generate(model, prompts[which], ANSWER, generator=generator)
    reward = rewards(answers, right[which])
    groups = reward.view(args.prompts, args.group)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    rows, mask = torch.cat([prompts[which], answers], 1), kept(answers)
    with torch.no_grad():
        old_logp, ref_logp = answer_logps(model, rows), answer_logps(reference, rows)
    for _ in range(args.updates):
        loss, stats = criterion(answer_logps(model, rows), advantages, old_logp, ref_logp, mask)
        update(model, optimizer, loss)
    return reward.mean().item(), stats


def plot(reward, checked, path):
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(range(1, len(reward) + 1), reward, color="tab:blue", linewidth=1, label="mean reward of sampled answers")
    ax.plot(*zip(*checked), "o-", color="tab:orange", markersize=4, label="likeliest answer, held-out sums")
    ax.set(xlabel="step of GRPO", ylabel="share of right answers", ylim=(0, 1))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder for reward.png")
    sizes = {"width": 64, "layers": 2, "warm-up": 50, "batch": 64}
    sizes |= {"steps": 200, "prompts": 48, "group": 8, "updates": 2, "check-every": 10}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    prompts, right = sums()
    test, train = slice(0, len(prompts) // 5), slice(len(prompts) // 5, None)
    model = LanguageModel(args.width, args.layers, PROMPT + ANSWER)
    # larger than for text: few steps have to tell the digits apart
    nn.init.normal_(model.embed.weight, std=0.1)
    start = time.perf_counter()
    warm_up(model, prompts[train], right[train], args, generator)
    print(f"after {args.warm_up} supervised steps, {time.perf_counter() - start:.0f} s:", end=" ")
    checked, reward = [(0, accuracy(model, prompts[test], right[test]))], []
    print(f"{checked[0][1]:.0%} of {test.stop} held-out sums right")

    reference = copy.deepcopy(model)
    criterion = tilefuse.nn.PolicyLoss(kl_beta=0.01, reduction="sequence")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, args.steps)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=args.steps)
        for step in range(args.steps):
            mean, stats = step_of_grpo(
                model, reference, optimizer, criterion, prompts[train], right[train], args, generator
            )
            schedule.step()
            reward.append(mean)
            if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
                checked.append((step + 1, accuracy(model, prompts[test], right[test])))
            progress.update(task, advance=1, description=f"reward {mean:.2f}, k3 {stats[5]:.3f}")
    plot(reward, checked, args.out / "reward.png")
    few = min(10, len(reward))
    print(f"reward {sum(reward[:few]) / few:.2f} in the first {few} steps, {sum(reward[-few:]) / few:.2f} in the last;")
    print(f"held-out {checked[0][1]:.0%}, then {checked[-1][1]:.0%}", end="; ")
    print(f"{time.perf_counter() - start:.0f} s; {args.out / 'reward.png'}")


if __name__ == "__main__":
    main()
