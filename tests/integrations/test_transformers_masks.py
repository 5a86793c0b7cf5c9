"""Every mask that Hugging Face can ask for, as a code or dense, says the same as Hugging Face's own."""

import itertools

import pytest
import torch

from tilefuse.testing import assert_bit_equal

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tilefuse.integrations.transformers import attention


class Config:
    sliding_window = 4
    attention_chunk_size = None
    model_type = "mistral"


def padding_of(kind, batch, length):
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "left":
        mask[0, : length // 2] = False
    elif kind == "right":
        mask[0, -(length // 3) - 1 :] = False
    elif kind == "both":
        mask[0, :1] = mask[0, -2:] = False
        mask[1, :3] = False
    elif kind == "hole":
        mask[0, length // 2] = False
    elif kind == "nothing":
        mask[1] = False
    elif kind == "none":
        return None
    return mask


KINDS = ("none", "full", "left", "right", "both", "hole", "nothing")
# queries, keys that were there before, slots of a static cache after the last query (None: a dynamic cache)
SIZES = ((1, 0, None), (9, 0, None), (1, 8, None), (3, 7, None), (9, 0, 6), (1, 8, 6), (3, 7, 6))


def cases():
    for (q_length, before, free), kind, window in itertools.product(SIZES, KINDS, (None, 4)):
        length = q_length + before
        if kind != "none" and kind != "full" and length < 6:
            continue
        yield q_length, before, free, kind, window


def ask(q_length, before, free, kind, window):
    """The arguments that ``create_causal_mask`` would pass."""
    batch, length = 2, q_length + before
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    kv_length, kv_offset = length, 0
    if free is not None:
        kv_length += free
    elif window is not None and before:
        # a sliding cache keeps the last window - 1 keys
        kv_offset = max(before - window + 1, 0)
        kv_length = length - kv_offset
    return {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": before if free is None else torch.tensor(before),
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding_of(kind, batch, length),
        "local_size": window,
        "allow_is_causal_skip": not (free is not None and q_length == 1),
        "config": Config(),
        "dtype": torch.float32,
    }


def wanted(arguments):
    """Hugging Face's dense mask ``[B, 1, Sq, Sk]``."""
    return masking_utils.sdpa_mask(**arguments | {"allow_is_causal_skip": False}).expand(2, 1, -1, -1)


class Layer(torch.nn.Module):
    num_key_value_groups = 2

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def check_attention(found, expected, q_length, kv_length, is_causal=True, **options):
    """The attention function on a mask against Hugging Face's on the dense one, with gradients."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, kv_length, 8, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, q_length, 4, 8, generator=generator)
    results = []
    for run, mask in ((attention.attention, found), (sdpa_attention_forward, expected)):
        out, _ = run(Layer(is_causal), q, k, v, mask, scaling=0.3, **(options if run is attention.attention else {}))
        grads = torch.autograd.grad(out, (q, k, v), weight)
        results.append((out, *grads))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        out, _ = attention.attention(Layer(is_causal), q, k, v, found, scaling=0.3, **options)
    torch.testing.assert_close(out, results[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
def test_codes_say_what_hugging_face_says(size, window):
    for q_length, before, free, kind, w in cases():
        if (q_length, before, free) != size or w != window:
            continue
        arguments = ask(q_length, before, free, kind, window)
        kv_length = arguments["kv_length"]
        found, expected = attention.mask(**arguments), wanted(arguments)
        if found is None or attention.is_code(found):
            dense = attention.dense_mask(found, 2, q_length, kv_length, True, "cpu")
            dense = torch.ones_like(expected) if dense is None else dense.expand(expected.shape)
        else:
            dense = found
        assert_bit_equal(dense, expected, name=f"{kind}")
        check_attention(found, expected, q_length, kv_length, sliding_window=window)
        if found is not None and found.dim() == 4 and found.shape[2] == 3:
            # a model that does not say its window
            check_attention(found, expected, q_length, kv_length)


@pytest.mark.parametrize(
    "size, kind, window, rows",
    [
        ((9, 0, None), "none", None, None),
        ((9, 0, None), "full", None, None),
        ((9, 0, None), "none", 4, 0),
        ((3, 7, None), "none", None, 0),
        ((3, 7, None), "full", 4, 0),
        ((1, 8, None), "full", None, None),
        ((1, 8, 6), "none", None, 1),
        ((1, 8, 6), "full", None, 1),
        ((9, 0, 6), "none", None, None),
        ((3, 7, 6), "none", None, 2),
        ((9, 0, None), "left", None, 2),
        ((9, 0, None), "left", 4, 3),
        ((9, 0, None), "right", None, 4),
        ((9, 0, None), "both", None, 4),
        ((9, 0, None), "nothing", None, 4),
    ],
)
def test_common_masks_are_not_dense(size, kind, window, rows):
    found = attention.mask(**ask(*size, kind, window))
    assert found is None if rows is None else attention.is_code(found) and found.shape[2] == rows


@pytest.mark.parametrize("kind", ["none", "left", "right", "both", "nothing", "hole"])
@pytest.mark.parametrize("size", [(9, 0, None), (3, 7, None), (1, 8, 6)], ids=str)
def test_sinks(size, kind):
    """gpt-oss: outputs and gradients, those of the sinks too, against the eager function of its file."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, eager_attention_forward

    class Sinks(GptOssAttention):
        num_key_value_groups = 2
        is_causal = True

        def __init__(self):
            torch.nn.Module.__init__(self)
            self.sinks = torch.nn.Parameter(torch.tensor([0.3, -1.0, 2.0, 0.0]))

    Sinks.__module__ = GptOssAttention.__module__
    arguments = ask(*size, kind, None)
    q_length, kv_length = arguments["q_length"], arguments["kv_length"]
    found = attention.mask(**arguments)
    additive = torch.zeros(()).masked_fill(~wanted(arguments), torch.finfo(torch.float32).min)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, kv_length, 8, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, q_length, 4, 8, generator=generator)
    module = Sinks()
    results = []
    for run, mask in ((attention.attention_over_eager, found), (eager_attention_forward, additive)):
        out, _ = run(module, q, k, v, mask, scaling=0.3, s_aux=module.sinks)
        results.append((out, *torch.autograd.grad(out, (q, k, v, module.sinks), weight)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences(window):
    ids = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2], [5, 6, 0, 1, 2, 3, 4, 5]])
    function = masking_utils.causal_mask_function
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
    config = Config()
    config.sliding_window = window
    arguments = {
        "batch_size": 2,
        "q_length": 8,
        "kv_length": 8,
        "mask_function": masking_utils.packed_sequence_compatibility_function(function, positions, ids),
        "attention_mask": None,
        "local_size": window,
        "allow_is_causal_skip": False,
        "config": config,
    }
    expected = wanted(arguments)
    found = attention.mask(**arguments)
    assert attention.is_code(found) and found.shape[3] == 6
    assert_bit_equal(attention.dense_mask(found, 2, 8, 8, True, "cpu"), expected)
    check_attention(found, expected, 8, 8, sliding_window=window)
    # as under torch.compile, where the number of sequences is not known
    starts = attention._starts_of(arguments["mask_function"], 2, 8, "cpu")
    assert starts.shape == (17,)
    found = attention._packed(starts, window)
    assert_bit_equal(attention.dense_mask(found, 2, 8, 8, True, "cpu"), expected)
    check_attention(found, expected, 8, 8, sliding_window=window)


def test_masks_that_no_code_says_stay_dense():
    blocks = torch.tensor([[0, 0, 0, -1, -1, 1, 1, 1]] * 2)
    causal = masking_utils.causal_mask_function
    plain = {"batch_size": 2, "q_length": 8, "kv_length": 8, "config": Config()}
    composed = masking_utils.or_masks(causal, masking_utils.blockwise_overlay(blocks))
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64))
    config = Config()
    config.attention_chunk_size = 4
    for arguments in (
        plain | {"mask_function": composed, "allow_is_causal_skip": False},
        plain | {"mask_function": chunked, "local_size": 4, "config": config},
        plain | {"mask_function": chunked, "local_size": 4, "allow_is_causal_skip": False},
    ):
        found = attention.mask(**arguments)
        assert found.dtype == torch.bool
        assert_bit_equal(found.expand(2, 1, 8, 8), wanted(arguments))


@pytest.mark.parametrize("kind", ["none", "full", "left", "right", "hole"])
def test_bidirectional(kind):
    padding = padding_of(kind, 2, 9)
    arguments = {
        "batch_size": 2,
        "q_length": 5,
        "kv_length": 9,
        "mask_function": masking_utils.bidirectional_mask_function,
        "attention_mask": padding,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
        "config": Config(),
    }
    found = attention.mask(**arguments)
    expected = wanted(arguments | {"allow_is_bidirectional_skip": False})
    assert (found is None) == (kind in ("none", "full"))
    assert found is None or attention.is_code(found) == (kind != "hole")
    check_attention(found, expected, 5, 9, is_causal=False)
