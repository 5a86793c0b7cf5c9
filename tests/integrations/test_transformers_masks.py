"""Every mask that Hugging Face can ask for says the same as Hugging Face's own, in entries and in numbers."""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch

from tilefuse.testing import assert_bit_equal

pytest.importorskip("transformers", reason="needs transformers (pip install tilefuse[transformers])")

from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tilefuse.integrations.transformers import attention, mask, rules


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
        "dtype": torch.float32,
    }


def wanted(arguments):
    """Hugging Face's dense mask ``[B, 1, Sq, Sk]``."""
    return masking_utils.sdpa_mask(**arguments | {"allow_is_causal_skip": False}).expand(2, 1, -1, -1)


def seen(compact, q_length, kv_length):
    """The entries that a compact form stands for, found by the ops themselves: each key has its own output."""
    q = torch.zeros(2, 1, q_length, 8)
    k = torch.zeros(2, 1, kv_length, 8)
    v = torch.eye(kv_length).expand(2, 1, -1, -1)
    fake = mask.LazyMask.of(compact, pytest.fail, (2, 1, q_length, kv_length), torch.bool, torch.device("cpu"))
    with torch.no_grad():
        out, _ = attention.attention(pytest.fail, None, Layer(), q, k, v, fake)
    return (out > 0).transpose(1, 2)


class Layer(torch.nn.Module):
    num_key_value_groups = 2

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal


def sdpa(module, *arguments, **options):
    return attention.attention(sdpa_attention_forward, None, module, *arguments, **options)


def check_attention(found, expected, q_length, kv_length, is_causal=True):
    """The attention function on a mask against Hugging Face's on the dense one, with gradients."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, kv_length, 8, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, q_length, 4, 8, generator=generator)
    results = []
    for run, each in ((sdpa, found), (sdpa_attention_forward, expected)):
        out, _ = run(Layer(is_causal), q, k, v, each, scaling=0.3)
        grads = torch.autograd.grad(out, (q, k, v), weight)
        results.append((out, *grads))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        out, _ = sdpa(Layer(is_causal), q, k, v, found, scaling=0.3)
    torch.testing.assert_close(out, results[1][0], rtol=1e-5, atol=1e-5)


def check(arguments, lazy=None):
    """A mask of ours against Hugging Face's: None where that is None, else the same entries and the same numbers."""
    arguments = {"device": torch.device("cpu")} | arguments
    q_length, kv_length = arguments["q_length"], arguments["kv_length"]
    found, stock = mask.sdpa_mask(**arguments), masking_utils.sdpa_mask(**arguments)
    assert (found is None) == (stock is None)
    is_causal = arguments["mask_function"] is not masking_utils.bidirectional_mask_function
    check_attention(found, stock if stock is None else stock.expand(2, 1, -1, -1), q_length, kv_length, is_causal)
    if found is None:
        return
    assert found.shape == (2, 1, q_length, kv_length) and found.dtype == stock.dtype
    compact = mask.compact_of(found)
    assert lazy is None or (compact is not None) == lazy
    if compact is not None:
        assert_bit_equal(seen(compact, q_length, kv_length).expand(found.shape), stock.expand(found.shape))
    # someone else's look at it, and the additive one
    assert_bit_equal(found & True, stock.expand(found.shape))
    arguments |= {"dtype": torch.bfloat16}
    additive, expected = mask.eager_mask(**arguments), masking_utils.eager_mask(**arguments)
    assert additive.dtype == torch.bfloat16
    assert_bit_equal(additive + 0, expected.expand(additive.shape))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window"])
def test_masks_say_what_hugging_face_says(size, window):
    for q_length, before, free, kind, w in cases():
        if (q_length, before, free) == size and w == window:
            # a mask of one row is small: with padding it stays dense; a window may have left the padding behind
            lazy = kind in ("none", "full") or (kind != "hole" and q_length > 1)
            check(ask(q_length, before, free, kind, window), lazy if window is None or q_length > 1 else None)


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
    found = mask.eager_mask(device=torch.device("cpu"), **arguments)
    additive = masking_utils.eager_mask(**arguments)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, q_length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, kv_length, 8, generator=generator, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, q_length, 4, 8, generator=generator)
    module = Sinks()
    ours = functools.partial(attention.attention, eager_attention_forward, attention.form_of(eager_attention_forward))
    results = []
    for run, each in ((ours, found), (eager_attention_forward, additive)):
        out, _ = run(module, q, k, v, each, scaling=0.3, s_aux=module.sinks)
        results.append((out, *torch.autograd.grad(out, (q, k, v, module.sinks), weight)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences(window):
    ids = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2], [5, 6, 0, 1, 2, 3, 4, 5]])
    plain = {"batch_size": 2, "q_length": 8, "kv_length": 8, "local_size": window, "allow_is_causal_skip": False}
    function = masking_utils.causal_mask_function
    rule = rules.CAUSAL
    if window is not None:
        function = masking_utils.sliding_window_causal_mask_function(window)
        rule = rules.sliding(window)
    by_closure = masking_utils.packed_sequence_compatibility_function(function, positions, ids)
    for each in (by_closure, rules.packed(rule, positions, ids)):
        check(plain | {"mask_function": each}, lazy=True)


def test_packed_sequences_of_something_else_stay_dense():
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 2)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)
    for rule in (rules.chunked(2, torch.zeros(2, dtype=torch.int64)), rules.sliding_both_ways(2), rules.EVERYTHING):
        packed = rules.packed(rule, positions, ids)
        plain = {"batch_size": 2, "q_length": 8, "kv_length": 8, "mask_function": packed}
        check(plain | {"allow_is_causal_skip": False}, lazy=False)


def test_masks_that_no_numbers_say_stay_dense():
    blocks = torch.tensor([[0, 0, 0, -1, -1, 1, 1, 1]] * 2)
    causal = masking_utils.causal_mask_function
    composed = masking_utils.or_masks(causal, masking_utils.blockwise_overlay(blocks))
    plain = {"batch_size": 2, "q_length": 8, "kv_length": 8, "allow_is_causal_skip": False}
    check(plain | {"mask_function": composed}, lazy=False)
    check(plain | {"mask_function": causal, "use_vmap": True}, lazy=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(11, 0, None), (3, 7, None), (5, 10, None), (1, 9, None), (9, 0, 6)], ids=str)
def test_chunks(size, kind):
    """Chunks of 4 are counted from the first real token; the cache keeps the last ones."""
    q_length, before, free = size
    arguments = ask(q_length, before, free, kind, None if free is not None else 6)
    padding = arguments["attention_mask"]
    first = torch.zeros(2, dtype=torch.int64)
    if padding is not None:
        first = (padding.cumsum(-1) == 0).sum(-1)
    arguments |= {"mask_function": rules.chunked(4, first), "local_size": 4}
    check(arguments, lazy=kind in ("none", "full") or (kind != "hole" and q_length > 1) or None)


def test_chunks_are_counted_from_a_token_that_the_cache_has_dropped():
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[0, :2] = False
    first = torch.tensor([2, 0])
    for q_length in (1, 4):
        arguments = {
            "batch_size": 2,
            "q_length": q_length,
            "kv_length": 6,
            "q_offset": 12 - q_length,
            "kv_offset": 6,
            "mask_function": rules.chunked(4, first),
            "attention_mask": padding,
            "local_size": 4,
        }
        check(arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [9, 14])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_windows_in_both_directions(window, length, kind):
    arguments = {
        "batch_size": 2,
        "q_length": length,
        "kv_length": length,
        "mask_function": rules.sliding_both_ways(window),
        "attention_mask": padding_of(kind, 2, length),
        "local_size": window,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
    }
    check(arguments, lazy=kind != "hole")


@pytest.mark.parametrize("kind", ["none", "full", "left", "right", "hole"])
def test_bidirectional(kind):
    arguments = {
        "batch_size": 2,
        "q_length": 5,
        "kv_length": 9,
        "mask_function": masking_utils.bidirectional_mask_function,
        "attention_mask": padding_of(kind, 2, 9),
        "allow_is_causal_skip": False,
    }
    check(arguments | {"allow_is_bidirectional_skip": True}, lazy=kind != "hole")
    # a model that asks for entries gets them
    check(arguments | {"allow_is_bidirectional_skip": False}, lazy=kind != "hole")


def test_a_lazy_mask_is_a_mask():
    """Every way to look at one, without and with its numbers kept."""
    arguments = ask(9, 0, None, "left", 4) | {"device": torch.device("cpu")}
    expected = wanted(arguments)

    def lazy():
        return mask.sdpa_mask(**arguments)

    assert type(lazy()) is mask.LazyMask and "LazyMask" in repr(lazy())
    for look in (
        lambda x: x[:, :, -3:],
        lambda x: torch.cat((x, x), -1),
        lambda x: x.sum(),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
        lambda x: x.expand(2, 4, -1, -1),
        lambda x: torch.where(x, 0.0, -1.0),
        lambda x: x.clone().masked_fill_(x, False),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: torch.tensor(x.tolist()),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ):
        assert_bit_equal(look(lazy()), look(expected))
    for same in (lambda x: x.detach(), lambda x: x.to("meta")):
        kept = same(lazy())
        assert mask.compact_of(kept) is not None and kept.shape == expected.shape
    # entries that someone writes count, and nothing else does then
    for write in (
        lambda x: x.__setitem__((..., 0), False),
        lambda x: x.logical_not_(),
        lambda x: setattr(x, "data", torch.zeros_like(expected)),
        lambda x: x.data.zero_(),
        lambda x: x.storage().fill_(0),
        lambda x: copy.copy(x).zero_(),
        lambda x: x.set_(torch.zeros_like(expected)),
        lambda x: torch.from_dlpack(x).zero_(),
        lambda x: torch.logical_not(expected, out=x),
        lambda x: torch._foreach_zero_([x]),
    ):
        written, stock = (
            mask.LazyMask.of(mask.compact_of(lazy()), expected.clone, (2, 1, 9, 9), torch.bool, torch.device("cpu")),
            expected.clone(),
        )
        write(written)
        write(stock)
        assert mask.compact_of(written) is None
        assert_bit_equal(written & True, stock)
    buffer = io.BytesIO()
    torch.save(lazy(), buffer)
    buffer.seek(0)
    assert_bit_equal(torch.load(buffer, weights_only=True), expected)
    # a region that someone compiles sees the entries
    torch._dynamo.reset()
    assert_bit_equal(torch.compile(lambda x: x.logical_not(), backend="aot_eager", fullgraph=True)(lazy()), ~expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_writes_to_views_of_a_lazy_mask_count(mode):
    arguments = ask(9, 0, None, "left", 4) | {"device": torch.device("cpu")}
    expected = wanted(arguments)
    with mode():
        for view in (lambda x: x[:, :, 0], lambda x: x.select(3, 1), lambda x: x.view(18, 9), lambda x: x.detach()):
            written, stock = mask.sdpa_mask(**arguments), expected.clone()
            alias = written.detach()
            for x in (written, stock):
                view(x).logical_not_()
            assert mask.compact_of(written) is mask.compact_of(alias) is None
            assert_bit_equal(written & True, stock)
            assert_bit_equal(alias & True, stock)
        for write in (
            lambda x: torch.logical_not(x.clone(), out=x),
            lambda x: torch._foreach_zero_([x]),
            lambda x: x.numpy().fill(True),
            lambda x: torch.from_dlpack(x).fill_(True),
        ):
            written, stock = mask.sdpa_mask(**arguments), expected.clone()
            for x in (written, stock):
                write(x)
            assert mask.compact_of(written) is None
            assert_bit_equal(written & True, stock)
        # a copy is its own
        kept = mask.sdpa_mask(**arguments)
        kept.to("cpu", copy=True).logical_not_()
        assert mask.compact_of(kept) is not None
        assert_bit_equal(kept & True, expected)


def test_the_cache_may_count_on_before_someone_looks():
    """A static cache hands over its counter, which it then changes in place."""
    arguments = ask(1, 8, 6, "none", None) | {"device": torch.device("cpu")}
    expected = wanted(arguments)
    found = mask.sdpa_mask(**arguments)
    arguments["q_offset"] += 1
    assert mask.compact_of(found).lengths.tolist() == [9, 9]
    assert_bit_equal(found.expand(2, 1, 1, -1) & True, expected)


def test_a_compiled_forward_sees_what_was_written_to_a_view():
    arguments = ask(1, 8, 6, "none", None)
    expected = wanted(arguments)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 8, generator=generator)
    k, v = (torch.randn(2, 2, 15, 8, generator=generator) for _ in range(2))
    layer = Layer()
    torch._dynamo.reset()
    run = torch.compile(lambda m: sdpa(layer, q, k, v, m, scaling=0.3)[0], backend="eager", fullgraph=True)
    found = mask.sdpa_mask(device=torch.device("cpu"), **arguments)
    with torch.no_grad():
        for written in (False, True):
            for x in (found, expected) if written else ():
                x[..., :3].fill_(False)
            out, _ = sdpa_attention_forward(layer, q, k, v, expected, scaling=0.3)
            torch.testing.assert_close(run(found), out, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_compiled_function_does_not_write_to_a_lazy_mask():
    """Its graph would write to the entries, and the mask would go on saying what it said."""
    arguments = ask(9, 0, None, "left", 4) | {"device": torch.device("cpu")}
    for write in (lambda x: x.logical_not_(), lambda x: x[0].logical_not_(), lambda x: x.__setitem__(0, False)):
        torch._dynamo.reset()
        found = mask.sdpa_mask(**arguments)
        with pytest.raises(RuntimeError, match="only to a clone"):
            torch.compile(write, backend="aot_eager")(found)
        assert_bit_equal(found & True, wanted(arguments))
    torch._dynamo.reset()
