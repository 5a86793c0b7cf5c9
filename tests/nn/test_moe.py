import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tilefuse
from tilefuse.distributed import ExpertParallel
from tilefuse.nn import MoE
from tilefuse.testing import assert_bit_equal


def make(**kwargs):
    options = {"score": "sigmoid", "correction_bias": True, "num_shared_experts": 2, "n_group": 4, "topk_group": 2}
    return MoE(32, 24, 8, 3, **options | {"routed_scaling_factor": 2.5} | kwargs)


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hf_block(kind):
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

    shared = {"hidden_size": 32, "num_experts_per_tok": 3, "experts_implementation": "eager"}
    deepseek = {"moe_intermediate_size": 24, "n_shared_experts": 2, "n_group": 4, "topk_group": 2}
    deepseek |= {"n_routed_experts": 8, "routed_scaling_factor": 2.5}
    if kind == "deepseek_v3":
        return v3.DeepseekV3MoE(transformers.DeepseekV3Config(**shared, **deepseek, norm_topk_prob=True))
    if kind == "deepseek_v2":
        config = transformers.DeepseekV2Config(**shared, **deepseek, topk_method="group_limited_greedy")
        return v2.DeepseekV2Moe(config)
    if kind.startswith("qwen3"):
        config = transformers.Qwen3MoeConfig(
            **shared, moe_intermediate_size=24, num_experts=8, norm_topk_prob=kind == "qwen3_norm"
        )
        block = qwen3.Qwen3MoeSparseMoeBlock(config)
    else:
        config = transformers.MixtralConfig(**shared, intermediate_size=24, num_local_experts=8)
        block = mixtral.MixtralSparseMoeBlock(config)
    block.config = config
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "qwen3", "qwen3_norm", "mixtral"])
def test_against_hugging_face(hf, kind, dtype):
    theirs = hf_block(kind)
    ours = MoE.from_config(theirs.config)
    assert (ours.top_k, ours.num_experts, ours.intermediate_size) == (3, 8, 24)
    seen = []

    def run_theirs(module, x):
        seen.append(module.gate(x)[2].sort(-1).values)
        return module(x)

    def run_ours(module, x):
        out, routing = module(x, return_routing=True)
        seen.append(routing.ids.long().sort(-1).values)
        assert routing.logits.dtype == (torch.float32 if kind.startswith("deepseek") else dtype)
        return out

    hf(ours, theirs, tokens(2, 20, 32), run_theirs, dtype=dtype, run_ours=run_ours)
    # the oracle is one for these operands only if it routes them alike
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert ours.gate.e_score_correction_bias is None or ours.gate.e_score_correction_bias.dtype == torch.float32


def test_bias_update_balances():
    """Aux-free balancing: a skewed router becomes more even, and the bias moves by sign and rate."""
    torch.manual_seed(0)
    moe = make(n_group=1, topk_group=1, initializer_range=0.2)
    with torch.no_grad():
        moe.gate.weight[0] += 0.2
    x = tokens(256, 32) + 0.3
    loads = []
    for _ in range(40):
        moe(x)
        counts = moe.gate.expert_counts.clone()
        assert counts.sum() == 256 * 3
        loads.append(int(counts.max()))
        before = moe.gate.e_score_correction_bias.clone()
        moe.update_bias(0.02)
        assert_bit_equal(moe.gate.e_score_correction_bias, tilefuse.moe_update_bias(before, counts, rate=0.02))
        assert not moe.gate.expert_counts.any()
    assert loads[-1] < 0.7 * loads[0] and loads[-1] < 1.25 * 96
    moe.eval()
    moe(x)
    assert not moe.gate.expert_counts.any()


def checkpointed(reentrant):
    return lambda moe, x: checkpoint(moe, x, use_reentrant=reentrant)


RUNS = {
    "plain": lambda moe, x: moe(x),
    "reentrant": checkpointed(True),
    "saved_tensors": checkpointed(False),
    "reentrant_in_saved_tensors": lambda moe, x: checkpoint(checkpointed(True), moe, x, use_reentrant=False),
    "saved_tensors_in_reentrant": lambda moe, x: checkpoint(checkpointed(False), moe, x, use_reentrant=True),
    "compiled_in_saved_tensors": lambda moe, x: checkpoint(
        torch.compile(moe, backend="aot_eager"), x, use_reentrant=False
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_choices_count_once(run):
    """Whatever is checkpointed; a look without gradients is no step."""
    moe = make(initializer_range=0.2)
    x, other = tokens(2, 12, 32).requires_grad_(), tokens(2, 30, 32)
    ids = moe(x, return_routing=True)[1].ids
    want = ids.flatten().bincount(minlength=8)
    moe.gate.expert_counts.zero_()
    for micro_batch in (1, 2):
        RUNS[run](moe, x).sum().backward()
        with torch.no_grad():
            moe(other)
        assert_bit_equal(moe.gate.expert_counts, micro_batch * want)


def test_counts_are_no_state():
    moe, x = make(), tokens(2, 12, 32)
    moe(x)
    assert not any("expert_counts" in name for name in (*moe.state_dict(), *dict(moe.named_buffers())))
    counts = moe.gate.expert_counts.clone()
    assert counts.any()
    other = copy.deepcopy(moe)
    other(x)
    assert_bit_equal(other.gate.expert_counts, 2 * counts)
    assert_bit_equal(moe.gate.expert_counts, counts)
    assert_bit_equal(pickle.loads(pickle.dumps(moe)).gate.expert_counts, counts)
    assert_bit_equal(moe.to(torch.bfloat16).gate.expert_counts, counts)
    moe.to_empty(device="meta").to_empty(device="cpu")
    assert_bit_equal(moe.gate.expert_counts, torch.zeros_like(counts))


def test_assigned_from_meta():
    moe, x = make(), tokens(2, 12, 32)
    other = make(device="meta")
    other.load_state_dict(moe.state_dict(), assign=True)
    assert not other.gate.expert_counts.is_meta
    assert_bit_equal(other(x), moe(x))
    assert_bit_equal(other.gate.expert_counts, moe.gate.expert_counts)


@pytest.mark.parametrize("act,activation", [("gelu", "gelu_erf"), ("gelu_pytorch_tanh", "gelu"), ("swish", "silu")])
def test_hidden_act(hf, act, activation):
    """Hugging Face's "gelu" is the erf form."""
    import transformers
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = transformers.DeepseekV2Config(
        hidden_size=32, num_experts_per_tok=3, experts_implementation="eager", moe_intermediate_size=24,
        n_shared_experts=2, n_routed_experts=8, topk_method="greedy", routed_scaling_factor=1.0, hidden_act=act,
    )  # fmt: skip
    ours = MoE.from_config(config)
    assert ours.activation == activation
    hf(ours, DeepseekV2Moe(config), 3 * tokens(2, 20, 32), lambda module, x: module(x), dtype=torch.float32)


def test_losses_and_routing():
    moe, x = make(), tokens(2, 12, 32)
    out, routing = moe(x, return_routing=True)
    assert_bit_equal(out, moe(x))
    assert routing.logits.shape == (24, 8) and routing.logits.dtype == torch.float32
    options = {"kind": "sequence", "sequence_length": 12}
    want = tilefuse.moe_balance_loss(routing.logits, routing.ids, score="sigmoid", **options)
    assert_bit_equal(moe.balance_loss(routing, **options), want)
    assert_bit_equal(moe.z_loss(routing), tilefuse.moe_z_loss(routing.logits))
    valid = torch.rand(2, 12) > 0.3
    want = tilefuse.moe_balance_loss(routing.logits, routing.ids, valid.view(-1), score="sigmoid")
    assert_bit_equal(moe.balance_loss(routing, valid), want)
    (moe.balance_loss(routing) + moe.z_loss(routing, valid)).backward()
    assert moe.gate.weight.grad.abs().sum() > 0


def test_padding_reaches_no_expert():
    moe, x = make(num_shared_experts=0), tokens(2, 12, 32)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 7:] = False
    want = moe(x)
    moe.gate.expert_counts.zero_()
    poisoned = x.clone()
    poisoned[1, 7:] = float("nan")
    out = moe(poisoned, valid)
    assert_bit_equal(out[valid], want[valid])
    assert not out[~valid].any()
    assert moe.gate.expert_counts.sum() == 3 * valid.sum()


def test_expert_parallel_group_of_one(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = ExpertParallel(8)
        moe, alone = make(parallel=parallel), make()
        for module in (moe, alone):
            module.reset_parameters(torch.Generator().manual_seed(0))
        x = tokens(2, 12, 32)
        assert_bit_equal(moe(x), alone(x))
        moe.update_bias()
        alone.update_bias()
        assert_bit_equal(moe.gate.e_score_correction_bias, alone.gate.e_score_correction_bias)
        assert "local_experts=8" in repr(moe)
        with pytest.raises(ValueError, match=r"nn.MoE: parallel must be made for num_experts 16, got 8"):
            MoE(32, 24, 16, 3, parallel=parallel)
    finally:
        dist.destroy_process_group()


def test_rank_draws_its_own_experts():
    """Each rank's experts are those of the single-process module."""

    class Rank:
        def __init__(self, rank):
            self.rank, self.num_experts, self.local_experts = rank, 8, 4

    whole = make()
    whole.reset_parameters(torch.Generator().manual_seed(5))
    for rank in range(2):
        part = make(parallel=Rank(rank))
        part.reset_parameters(torch.Generator().manual_seed(5))
        for name, tensor in part.state_dict().items():
            want = whole.state_dict()[name]
            assert_bit_equal(tensor, want[4 * rank : 4 * rank + 4] if name.startswith("experts") else want)


def test_autocast():
    moe, x = make(initializer_range=0.2), tokens(2, 12, 32)
    want, routing = moe(x, return_routing=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, cast = moe(x, return_routing=True)
    assert out.dtype == torch.bfloat16 and torch.equal(cast.ids, routing.ids)
    torch.testing.assert_close(out.float(), want, rtol=0, atol=0.03 * float(want.detach().abs().max()))
    out.float().sum().backward()
    assert moe.experts.gate_up_proj.grad.dtype == torch.float32


def test_compile():
    moe, x = make(initializer_range=0.2), tokens(2, 12, 32)
    other = copy.deepcopy(moe)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    results = []
    for module in (moe, compiled):
        leaf = x.clone().requires_grad_()
        out, routing = module(leaf, return_routing=True)
        (out.sum() + moe.balance_loss(routing)).backward()
        results.append((out, leaf.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert torch.equal(moe.gate.expert_counts, other.gate.expert_counts)


@pytest.mark.parametrize("kwargs", [{}, {"num_shared_experts": 0, "correction_bias": False}], ids=["full", "plain"])
def test_initialisation(initialisation, kwargs):
    moe = initialisation(lambda **factory: make(**kwargs, **factory))
    assert ("gate.e_score_correction_bias" in moe.state_dict()) == (not kwargs)
    moe = moe.to(torch.bfloat16)
    assert kwargs or moe.gate.e_score_correction_bias.dtype == torch.float32
    moe.double()
    assert kwargs or moe.gate.e_score_correction_bias.dtype == torch.float32
    assert "num_experts=8, top_k=3" in repr(moe)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"hidden_size": 0}, "hidden_size must be an int >= 1, got 0"),
        ({"intermediate_size": 0}, "intermediate_size must be an int >= 1, got 0"),
        ({"num_experts": 0}, "num_experts must be an int >= 1, got 0"),
        ({"top_k": 0}, "top_k must be an int >= 1, got 0"),
        ({"top_k": 9}, "top_k must be at most 8, the experts of topk_group groups, got 9"),
        ({"top_k": 3, "n_group": 4}, "top_k must be at most 2, the experts of topk_group groups, got 3"),
        ({"n_group": 3}, "n_group must be a divisor of num_experts 8, got 3"),
        ({"n_group": 0}, "n_group must be an int >= 1, got 0"),
        ({"topk_group": 2}, "topk_group must be at most n_group 1, got 2"),
        ({"score": "relu"}, "score must be one of softmax, sigmoid, sqrtsoftplus, none, got 'relu'"),
        ({"group_score": "mean"}, "group_score must be one of max, top2, got 'mean'"),
        ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_erf, got 'relu'"),
        ({"num_shared_experts": -1}, "num_shared_experts must be at least 0, got -1"),
        ({"shared_intermediate_size": -1}, "shared_intermediate_size must be at least 0, got -1"),
    ],
)
def test_constructor_errors(kwargs, message):
    with pytest.raises(ValueError, match=f"tilefuse.nn.MoE: {message}"):
        MoE(**{"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2} | kwargs)


def test_call_errors():
    moe, x = make(correction_bias=False), tokens(2, 12, 32)
    with pytest.raises(ValueError, match=r"tilefuse.nn.MoE: x must be \[.., 32\], got \[2, 12, 31\] float32"):
        moe(x[..., 1:])
    with pytest.raises(TypeError, match=r"tilefuse.nn.MoE: x must be float32"):
        moe(x.int())
    with pytest.raises(ValueError, match=r"tilefuse.nn.MoE: valid must be \[2, 12\] bool, got \[12\] bool"):
        moe(x, torch.ones(12, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"tilefuse.nn.MoE: valid must be bool"):
        moe(x, torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"tilefuse.nn.MoE.update_bias: correction_bias must be True"):
        moe.update_bias()

    class Unknown:
        model_type, hidden_act, initializer_range = "bert", "silu", 0.02

    with pytest.raises(ValueError, match=r"tilefuse.nn.MoE.from_config: config must be of type deepseek_v3"):
        MoE.from_config(Unknown())
    Unknown.hidden_act = "relu"
    with pytest.raises(ValueError, match=r"tilefuse.nn.MoE.from_config: hidden_act must be one of silu, swish, gelu"):
        MoE.from_config(Unknown())
