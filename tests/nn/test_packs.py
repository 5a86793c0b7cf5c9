"""Packed modules compute the bits of the parameters, notice changes and show checkpoints nothing but parameters."""

import copy
import gc
import io
import threading

import pytest
import torch

import tilefuse
from tilefuse import packs
from tilefuse.nn import FP8Linear, MoE
from tilefuse.testing import assert_bit_equal
from tilefuse.testing.memory import allocations

BF16, CODES = torch.bfloat16, torch.float8_e4m3fn
MODES = ["keep", "only"]


def moe(**options):
    torch.manual_seed(0)
    return MoE(64, 48, 8, 2, dtype=BF16, initializer_range=0.2, router_dtype=None, **options).eval()


def fp8(n=96, k=160):
    torch.manual_seed(0)
    return FP8Linear(k, n, initializer_range=0.2, dtype=BF16).eval()


def tokens(k=64, rows=5, seed=0):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(BF16)


MODULES = {"moe": (moe, 64), "fp8": (fp8, 160)}


@pytest.fixture(params=MODULES)
def case(request):
    make, width = MODULES[request.param]
    module = make()
    x = tokens(width)
    with torch.no_grad():
        return module, x, module(x)


def owner(module):
    return module.experts if isinstance(module, MoE) else module


def name_of(module):
    return "gate_up_proj" if isinstance(module, MoE) else "weight"


def made(module):
    return owner(module).__dict__["_packs"].weights


@torch.no_grad()
def run(module, x):
    return module(x)


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_stay(case, mode, monkeypatch):
    module, x, want = case
    seen = []
    take = packs.packed_weights
    monkeypatch.setattr(packs, "packed_weights", lambda *args: seen.append(take(*args)) or seen[-1])
    size = sum(p.nbytes for p in owner(module).parameters() if p.dim() > 1 and p.dtype in (BF16, CODES))
    memory = module.pack(mode)
    assert memory == (size, 2 * size if mode == "keep" else size)
    assert_bit_equal(run(module, x), want)
    assert isinstance(seen[0][0], tilefuse.PackedWeight)
    assert module.unpack() is module
    assert_bit_equal(run(module, x), want)
    assert seen[1] is None


def test_gradients_take_the_parameters(case):
    module, x, _ = case
    plain, packed = copy.deepcopy(module), module
    packed.pack()
    for m in (plain, packed):
        m.input = x.clone().requires_grad_()
        m(m.input).float().square().sum().backward()
    assert_bit_equal(plain.input.grad, packed.input.grad)
    for a, b in zip(plain.parameters(), packed.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_bit_equal(a.grad, b.grad)


def test_gradients_of_freed_weights_are_refused(case):
    module, x, want = case
    module.pack("only")
    with pytest.raises(RuntimeError, match="are packed only, for inference"):
        module(x.requires_grad_())
    assert_bit_equal(run(module, x), want)
    module.unpack()(x).float().sum().backward()
    assert x.grad is not None


def step(module):
    with torch.no_grad():
        parameter = getattr(owner(module), name_of(module))
        parameter.view(torch.uint8 if parameter.dtype == CODES else BF16).zero_()


def replace(module):
    parameter = getattr(owner(module), name_of(module))
    setattr(
        owner(module),
        name_of(module),
        torch.nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False),
    )


def load(module):
    state = {key: value.clone() for key, value in module.state_dict().items()}
    for key, value in state.items():
        if key.endswith(name_of(module)):
            state[key] = torch.zeros_like(value)
    module.load_state_dict(state)


def assign(module):
    state = {key: value.clone() for key, value in module.state_dict().items()}
    for key, value in state.items():
        if key.endswith(name_of(module)):
            state[key] = torch.zeros_like(value)
    module.load_state_dict(state, assign=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [step, replace, load, assign])
def test_a_changed_weight_is_packed_again(case, mode, change):
    module, x, want = case
    if change is step and mode == "only":
        pytest.skip("there is nothing to step")
    module.pack(mode)
    assert_bit_equal(run(module, x), want)
    change(module)
    out = run(module, x)
    assert not torch.equal(out, want)
    assert_bit_equal(run(module.unpack(), x), out)


def test_data_at_an_address_that_was_used_before(case):
    module, x, want = case
    module.pack()
    parameter = getattr(owner(module), name_of(module))
    address = parameter.data_ptr()
    for _ in range(50):
        parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype)
        if parameter.data_ptr() == address:
            break
    assert not torch.equal(run(module, x), want)


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_have_parameters(case, mode):
    module, x, want = case
    before = {key: value.clone() for key, value in module.state_dict().items()}
    module.pack(mode)
    for state in (module.state_dict(), module.state_dict(keep_vars=True)):
        assert list(state) == list(before)
        for key, value in state.items():
            assert_bit_equal(value.detach().view(-1).view(torch.uint8), before[key].view(-1).view(torch.uint8))
    assert [name for name, _ in module.named_parameters()] == [
        key for key in before if "bias" not in key or "e_s" not in key
    ]
    # another module's state into a packed one, and back
    other = copy.deepcopy(module)
    other.load_state_dict(before)
    assert_bit_equal(run(other, x), want)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def reloaded(module):
    return torch.load(io.BytesIO(saved(module)), weights_only=False)


@pytest.mark.parametrize("mode", MODES)
def test_copies(case, mode):
    module, x, want = case
    module.pack(mode)
    for twin in (copy.deepcopy(module), reloaded(module)):
        assert len(made(twin)) and made(twin)[0].data.data_ptr() != made(module)[0].data.data_ptr()
        assert_bit_equal(run(twin, x), want)
        load(twin)
        assert not torch.equal(run(twin, x), want)
        assert_bit_equal(run(module, x), want)
    if mode == "keep":
        # the pack itself is not written
        assert len(saved(module)) < 1.3 * len(saved(copy.deepcopy(module).unpack()))


@pytest.mark.parametrize("mode", MODES)
def test_moves(case, mode):
    module, x, want = case
    module.pack(mode)
    assert_bit_equal(run(module.to("cpu"), x), want)
    weight = made(module)[0]
    assert isinstance(weight, tilefuse.PackedWeight)
    module.to(torch.float32)
    assert run(module, x.float()).dtype == torch.float32
    if isinstance(module, MoE):
        assert not any(p.is_meta for p in module.parameters())
    assert_bit_equal(run(module.to(BF16), x), want)
    assert owner(module).__dict__["_packs"].weights[0].data.device.type == "cpu"
    module.to("meta")
    assert all(p.is_meta for p in module.parameters())


def test_reset_parameters(case):
    module, x, want = case
    module.pack("only")
    torch.manual_seed(3)
    module.reset_parameters()
    out = run(module, x)
    assert not torch.equal(out, want)
    module.unpack()
    torch.manual_seed(3)
    module.reset_parameters()
    assert_bit_equal(run(module, x), out)


@pytest.fixture
def frames_evaluated_by_dynamo():
    """As an exception out of a compiled function leaves them: a call of Python counts its arguments twice."""
    before = torch._C._dynamo.eval_frame.set_eval_frame(False)
    yield
    torch._C._dynamo.eval_frame.set_eval_frame(before)


def test_freeing_packs_in_place_where_dynamo_evaluates(frames_evaluated_by_dynamo):
    test_freeing_packs_in_place()


def test_freeing_packs_in_place():
    """Nothing but one expert's matrix beside the weights, whose memory the packs take over."""
    module, x = moe(), tokens()
    want = run(module, x)
    addresses = {p.data_ptr(): p.nbytes for p in module.experts.parameters()}
    largest = max(p[0].nbytes for p in module.experts.parameters())
    # what a cycle still holds would count as an owner
    gc.collect()
    with allocations() as sizes:
        module.pack("only")
    assert {w.data.data_ptr() for w in made(module)} == set(addresses)
    assert all(m.nbytes <= largest for m in sizes if m.address not in addresses)
    assert_bit_equal(run(module, x), want)


@pytest.mark.parametrize("how", ["alias", "parameter", "numpy", "optimizer"])
def test_memory_that_others_see_is_left_alone(how):
    module, x = moe(), tokens()
    values = module.experts.gate_up_proj.detach().float().numpy().copy()
    if how == "numpy":
        mine = module.experts.gate_up_proj.detach().clone().view(torch.int16).numpy()
        module.experts.gate_up_proj = torch.nn.Parameter(torch.from_numpy(mine).view(BF16))
        held = torch.from_numpy(mine).view(BF16)
    elif how == "optimizer":
        optimizer = torch.optim.SGD(module.parameters())
        held = optimizer.param_groups[0]["params"][[p.dim() == 3 for p in module.parameters()].index(True)]
    else:
        held = module.experts.gate_up_proj
        held = held if how == "parameter" else held.detach()
    want = run(module, x)
    module.pack("only")
    assert_bit_equal(held.detach().float(), torch.from_numpy(values))
    assert_bit_equal(run(module, x), want)


@pytest.mark.parametrize("mode", MODES)
def test_compiled(case, mode):
    module, x, want = case
    module.pack(mode)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_bit_equal(compiled(x), want)
        if mode == "only":
            return
        step(module)
        with pytest.raises(RuntimeError, match=r"changed since it was packed.*call pack\(\) once more"):
            compiled(x)
        module.pack()
        assert_bit_equal(compiled(x), module(x))
        assert not torch.equal(compiled(x), want)


def test_inference_mode(case):
    module, x, want = case
    module.pack("only")
    with torch.inference_mode():
        assert_bit_equal(module(x), want)
        load(module)
        module(x)
    module.unpack()
    assert not any(p.is_inference() for p in module.parameters())
    with torch.inference_mode():
        other = copy.deepcopy(module)
    with pytest.raises(ValueError, match="was made in inference mode, where changes are not counted"):
        other.pack()


def test_threads(case):
    module, x, want = case
    module.pack()
    owner(module)._packs.weights = ()
    results = []
    threads = [threading.Thread(target=lambda: results.append(run(module, x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(out, want) for out in results)


def test_autocast_to_another_dtype_takes_the_parameters():
    module, x = moe(), tokens().float()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        want = module(x)
        module.pack()
        assert_bit_equal(module(x), want)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        packed = module(x)
        assert_bit_equal(packed, module.unpack()(x))


@pytest.mark.parametrize(
    ("module", "mode", "message"),
    [
        (lambda: moe().float(), "keep", "gate_up_proj is float32, packed weights are bfloat16 or float8_e4m3fn"),
        (lambda: moe(device="meta"), "only", "gate_up_proj is on meta, packed weights are for the CPU"),
        (moe, "both", "mode must be one of keep, only, got 'both'"),
        (lambda: FP8Linear(8, 8, master_weight=True), "keep", "master_weight must be False"),
    ],
)
def test_errors(module, mode, message):
    module = module()
    with pytest.raises(ValueError, match=f"pack: {message}"):
        module.pack(mode)
    assert "_packs" not in owner(module).__dict__


def test_parametrised_weights_are_refused_and_served():
    class Twice(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    module, x = moe(), tokens()
    module.pack()
    torch.nn.utils.parametrize.register_parametrization(module.experts, "gate_up_proj", Twice())
    out = run(module, x)
    module.unpack()
    assert_bit_equal(run(module, x), out)
    with pytest.raises(ValueError, match="gate_up_proj is no parameter of its own"):
        module.pack()
