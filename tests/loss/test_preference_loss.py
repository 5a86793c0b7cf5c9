"""``preference_loss`` and ``sequence_logp``: against TRL's formulas, written out in float64."""

import itertools
import math

import pytest
import torch

import tilefuse
from tilefuse.ops.loss.preference_loss import KINDS
from tilefuse.testing.inputs.loss.preference_loss import pairs, tokens

BOUNDS = torch.tensor([1, 4, 4, 11], dtype=torch.int32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def trl(kind, chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, margin):
    """One pair, as TRL's DPO, CPO and ORPO trainers write it, in Python's floats."""
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    for_chosen, for_rejected = chosen - ref_chosen, rejected - ref_rejected
    lead = beta * logits - margin
    return {
        "sigmoid": lambda: -math.log(sigmoid(lead)) * (1 - smoothing) - math.log(sigmoid(-lead)) * smoothing,
        "robust": lambda: (
            (-math.log(sigmoid(lead)) * (1 - smoothing) + math.log(sigmoid(-lead)) * smoothing) / (1 - 2 * smoothing)
        ),
        "hinge": lambda: max(0.0, 1 - lead),
        "ipo": lambda: (logits - 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: (1 - sigmoid(beta * for_chosen)) + sigmoid(beta * for_rejected),
        "apo_down": lambda: sigmoid(beta * for_chosen) + (1 - sigmoid(beta * (for_chosen - for_rejected))),
        "simpo": lambda: trl("sigmoid", chosen, rejected, 0.0, 0.0, beta, smoothing, margin),
        "orpo": lambda: (
            -beta
            * math.log(sigmoid((chosen - rejected) - (math.log1p(-math.exp(chosen)) - math.log1p(-math.exp(rejected)))))
        ),
    }[kind]()


@pytest.mark.parametrize("references", [True, False], ids=["references", "without"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_trl(kind, references):
    given = pairs(9)[: 4 if references else 2]
    options = {"beta": 0.7, "label_smoothing": 0.15, "margin": 0.3}
    losses, better, worse = tilefuse.preference_loss(*given, kind=kind, **options)
    refs = [x.tolist() for x in given[2:]] or [[0.0] * 9] * 2
    expected = [trl(kind, *four, *options.values()) for four in zip(given[0].tolist(), given[1].tolist(), *refs)]
    torch.testing.assert_close(losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=1e-6)
    use = references and kind not in ("simpo", "orpo")
    torch.testing.assert_close(better, 0.7 * (given[0] - (given[2] if use else 0)))
    torch.testing.assert_close(worse, 0.7 * (given[1] - (given[3] if use else 0)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float64(kind):
    chosen, rejected, *references = pairs(6, dtype=torch.float64)
    leaves = chosen.requires_grad_(), rejected.requires_grad_()

    def losses(chosen, rejected):
        return tilefuse.preference_loss(chosen, rejected, *references, kind=kind, beta=0.6, label_smoothing=0.1)[0]

    assert torch.autograd.gradcheck(losses, leaves) and torch.autograd.gradgradcheck(losses, leaves)


def test_rewards_have_no_gradient():
    given = pairs(3)
    losses, better, worse = tilefuse.preference_loss(given[0].requires_grad_(), *given[1:])
    assert losses.requires_grad and not better.requires_grad and not worse.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_pairs_have_finite_gradients(kind):
    """A certain answer (logp 0), a nearly impossible one, and references far away."""
    chosen, rejected = torch.tensor([0.0, -1e4, -1e-9]), torch.tensor([-1e4, 0.0, -1e-9])
    leaves = chosen.requires_grad_(), rejected.requires_grad_()
    losses, *_ = tilefuse.preference_loss(*leaves, torch.zeros(3), torch.full((3,), -50.0), kind=kind)
    for found in (losses, *torch.autograd.grad(losses.sum(), leaves)):
        assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype):
    given = pairs(4, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = tilefuse.preference_loss(*given)
    assert all(x.dtype == wide for x in found)
    for a, b in zip(found, tilefuse.preference_loss(*(x.to(wide) for x in given))):
        assert torch.equal(a, b)


C = torch.zeros(3)


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r"rejected must be of chosen's shape \[3\], got \[2\] float32", (C, C[:2]), {}),
        (ValueError, "ref_rejected must be given with ref_chosen, got None", (C, C, C), {}),
        (ValueError, "ref_chosen must be given with ref_rejected, got None", (C, C, None, C), {}),
        (ValueError, "kind must be one of sigmoid, hinge, .*got 'dpo'", (C, C), {"kind": "dpo"}),
        (ValueError, r"label_smoothing must be in \[0, 0.5\), got 0.5", (C, C), {"label_smoothing": 0.5}),
        (ValueError, "beta must be above 0 for 'ipo', got 0.0", (C, C), {"kind": "ipo", "beta": 0.0}),
        (TypeError, "chosen must be float32 or", (C.int(), C), {}),
        (TypeError, "rejected must be float32 or", (C, C.int()), {}),
        (RuntimeError, "ref_chosen requires grad", (C, C, torch.zeros(3, requires_grad=True), C), {}),
    ],
)
def test_errors(error, match, args, options):
    for call in (tilefuse.preference_loss, torch.ops.tilefuse.preference_loss):
        with pytest.raises(error, match=match):
            call(*args, **options)


@pytest.mark.parametrize("average", [False, True])
def test_sequences_by_hand(average):
    logp, target = tokens((12,))
    found = tilefuse.sequence_logp(logp, target, BOUNDS, average=average)
    expected = []
    for first, last in itertools.pairwise(BOUNDS.tolist()):
        kept = [x for x, y in zip(logp.tolist()[first:last], target.tolist()[first:last]) if y != -100]
        expected.append(sum(kept) / (max(len(kept), 1) if average else 1))
    torch.testing.assert_close(found, torch.tensor(expected))
    assert found[1] == 0


@pytest.mark.parametrize("average", [False, True])
def test_padded_equals_packed(average):
    logp, target = tokens((4, 9))
    target[2] = 7
    logp[2] = -torch.rand(9)
    target[3] = -100
    padded = tilefuse.sequence_logp(logp, target, average=average)
    packed = tilefuse.sequence_logp(logp.flatten(), target.flatten(), torch.arange(5) * 9, average=average)
    torch.testing.assert_close(padded, packed)
    assert padded[3] == packed[3] == 0 and padded.isfinite().all()


def test_ignored_tokens_get_no_gradient():
    logp, target = tokens((3, 8))
    for call in (
        lambda x: tilefuse.sequence_logp(x, target),
        lambda x: tilefuse.sequence_logp(x.flatten(), target.flatten(), torch.arange(4) * 8),
    ):
        leaf = logp.clone().requires_grad_()
        (found,) = torch.autograd.grad(call(leaf).sum(), leaf)
        assert torch.equal(found, (target != -100).float())


def test_another_ignore_index():
    logp = -torch.rand(1, 4)
    target = torch.tensor([[0, 5, 0, -100]], dtype=torch.int32)
    torch.testing.assert_close(tilefuse.sequence_logp(logp, target, ignore_index=0), logp[:, 1] + logp[:, 3])


def test_sequence_gradients_in_float64():
    logp, target = tokens((12,), dtype=torch.float64)
    logp = logp.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tilefuse.sequence_logp(x, target, BOUNDS, average=True), logp)


L, T2 = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (ValueError, r"logp must be \[B, S\], or \[T\] with cu_seqlens", (L[None], T2[None])),
        (TypeError, "logp must be float32 or", (T2, T2)),
        (ValueError, r"target must be of logp's shape \[2, 3\], got \[3\] int64", (L, T2[0])),
        (TypeError, "target must be int32 or int64", (L, L)),
        (ValueError, r"cu_seqlens must be None unless logp is packed \[T\]", (L, T2, BOUNDS)),
        (ValueError, r"cu_seqlens must be given for packed \[T\], got None", (L[0], T2[0])),
        (ValueError, r"cu_seqlens must be \[B \+ 1\] int32 or int64", (L[0], T2[0], BOUNDS[None])),
        (TypeError, "cu_seqlens must be int32 or int64", (L[0], T2[0], BOUNDS.float())),
    ],
)
def test_sequence_errors(error, match, args):
    for call in (tilefuse.sequence_logp, torch.ops.tilefuse.sequence_logp):
        with pytest.raises(error, match=match):
            call(*args)
