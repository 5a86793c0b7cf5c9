"""Log-probabilities of a head's targets, with and without their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import tilefuse
from tilefuse.testing.inputs.loss.linear_logprobs import naive

from ..harness import Case, compiled, integers, normal

# of seven tokens one is ignored
EVERY = 7


def statistics(logits, target):
    """As trainers write it: ignored tokens multiplied by 0."""
    logp = logits.log_softmax(-1)
    kept = target != -100
    at = target.clamp(min=0).long()
    entropy = -(logp.exp() * logp).sum(-1)
    argmax = torch.where(kept, logits.argmax(-1), -1).int()
    found = (logp.gather(-1, at[:, None])[:, 0], logits.logsumexp(-1), entropy)
    return *(value * kept for value in found), argmax


def eager(x, weight, target):
    return statistics((x @ weight.t()).float(), target)


def targets(tokens, vocabulary, device, generator):
    """Of each token, of which some are ignored."""
    target = integers(0, vocabulary, (tokens,), device, generator).long()
    target[::EVERY] = -100
    return target


def kept_of(tokens):
    """How many of so many tokens ``targets`` keeps."""
    return tokens - len(range(0, tokens, EVERY))


def head(tokens, vocabulary, hidden):
    """Inputs of a head, with logits of about the spread of a trained model's."""

    def inputs(device, generator):
        x = normal((tokens, hidden), torch.bfloat16, device, generator)
        weight = normal((vocabulary, hidden), torch.bfloat16, device, generator, hidden**-0.5)
        return x, weight, targets(tokens, vocabulary, device, generator)

    return inputs


def work(tokens, vocabulary, hidden, mode):
    """(least bytes, least FLOPs): kept tokens alone, and one product of the forward for two of the backward."""
    kept = kept_of(tokens)
    products = {"forward": 1, "backward": 2, "forward+backward": 3}[mode]
    writes = 0 if mode == "forward" else 2 * hidden * (vocabulary + tokens)
    return 2 * hidden * (vocabulary + kept) + writes, products * 2 * kept * vocabulary * hidden


# (tokens, vocabulary, hidden, mode, suite, devices)
SHAPES = (
    (256, 8192, 512, "forward", "quick", ("cpu", "cuda")),
    (256, 8192, 512, "forward+backward", "full", ("cpu", "cuda")),
    (512, 32000, 1024, "forward", "full", ("cpu", "cuda")),
    (4096, 129280, 7168, "forward", "full", ("cuda",)),
)


def cases() -> Iterator[Case]:
    for tokens, vocabulary, hidden, mode, suite, devices in SHAPES:
        least, flops = work(tokens, vocabulary, hidden, mode)
        yield Case(
            op="linear_logprobs",
            name=f"{tokens} tokens, vocabulary {vocabulary}, hidden {hidden}",
            dtype="bfloat16",
            mode=mode,
            inputs=head(tokens, vocabulary, hidden),
            oracle_inputs=head(64, 5000, 256),
            run=tilefuse.linear_logprobs,
            naive=naive,
            peers={"eager": eager, "torch.compile": compiled(eager)},
            grads=(0, 1),
            bytes=least,
            flops=flops,
            suite=suite,
            devices=devices,
            memory=True,
        )
