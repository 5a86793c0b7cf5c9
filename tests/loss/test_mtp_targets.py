"""``mtp_targets``: which token each head of multi-token prediction predicts."""

import itertools

import pytest
import torch

import tilefuse


def by_hand(target, depth, bounds, ignore_index=-100):
    rows = []
    for k in range(1, depth + 1):
        row = [ignore_index] * len(target)
        for first, last in itertools.pairwise(bounds):
            for t in range(first, last - k):
                row[t] = target[t + k]
        rows.append(row)
    return rows


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_documents_shorter_than_the_depth(depth, dtype):
    target = torch.tensor([5, 6, -100, 8, 9, 10, 11, 12, 13, 14], dtype=dtype)
    # tokens of no document on either side, an empty document and one of a single token
    bounds = [1, 4, 4, 5, 9]
    found = tilefuse.mtp_targets(target, depth, torch.tensor(bounds, dtype=torch.int32))
    assert found.dtype == dtype and found.shape == (depth, 10)
    assert found.tolist() == by_hand(target.tolist(), depth, bounds)


def test_one_document_and_rows():
    target = torch.arange(12)
    whole = tilefuse.mtp_targets(target, 3, ignore_index=99)
    assert whole.tolist() == by_hand(target.tolist(), 3, [0, 12], 99)
    rows = tilefuse.mtp_targets(target.view(2, 6), 3, ignore_index=99)
    assert rows.shape == (3, 2, 6)
    assert rows.flatten(1).tolist() == by_hand(target.tolist(), 3, [0, 6, 12], 99)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_no_tokens(shape):
    assert tilefuse.mtp_targets(torch.zeros(shape, dtype=torch.int64), 2).shape == (2, *shape)
    assert tilefuse.mtp_targets(torch.zeros(0, dtype=torch.int32), 2, torch.zeros(1, dtype=torch.int32)).shape == (2, 0)


def test_compiles_for_all_lengths():
    compiled = torch.compile(tilefuse.mtp_targets, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 20):
        target, bounds = torch.arange(tokens), torch.tensor([0, 5, tokens])
        assert torch.equal(compiled(target, 2, bounds), tilefuse.mtp_targets(target, 2, bounds))


T = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (ValueError, r"target must be \[T\] or \[B, S\]", (T[None, None], 1)),
        (TypeError, "target must be int32 or int64", (T.float(), 1)),
        (ValueError, "depth must be at least 0, got -1", (T, -1)),
        (ValueError, r"cu_seqlens must be None unless target is packed \[T\]", (T[None], 1, T)),
        (TypeError, "cu_seqlens must be int32 or int64", (T, 1, T.float())),
    ],
)
def test_errors(error, match, args):
    with pytest.raises(error, match=match):
        tilefuse.mtp_targets(*args)
