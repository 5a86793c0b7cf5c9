"""The sparse mixture-of-experts block: router, routed experts, shared experts, and what balances them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import errors, library, packs
from ..ops.moe.moe_experts import moe_experts
from ..ops.moe.moe_losses import moe_balance_loss, moe_update_bias, moe_z_loss
from ..ops.moe.moe_route import moe_route
from .common import check_positive, draw_, keep_dtype, linear, reset_linear

__all__ = ["MoE", "Routing"]

_NAME = "nn.MoE"
_SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
_GROUP_SCORES = ("max", "top2")
_ACTIVATIONS = {"silu": F.silu, "gelu": partial(F.gelu, approximate="tanh"), "gelu_erf": F.gelu}
# Hugging Face's names
_HIDDEN_ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu_erf", "gelu_pytorch_tanh": "gelu"}


class Routing(NamedTuple):
    """What the router did with T tokens: ``logits [T, E]``, ``weights [T, k]`` float32, ``ids [T, k]`` int32."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


@torch.library.custom_op("tilefuse_nn::count_choices_", mutates_args=("counts",))
def _count_choices_(counts: Tensor, ids: Tensor) -> None:
    """Adds how often each expert was chosen to ``counts [E]`` int64; a recomputation in a backward adds nothing."""
    if _in_backward():
        return
    counts += _histogram(ids, counts.shape[0])


@_count_choices_.register_fake
def _(counts: Tensor, ids: Tensor) -> None:
    return None


def _histogram(ids: Tensor, num_experts: int) -> Tensor:
    # the spare last entry takes dropped ids; integers add up in any order
    slots = torch.where(ids >= 0, ids, num_experts).flatten().long()
    return slots.new_zeros(num_experts + 1).scatter_add_(0, slots, torch.ones_like(slots))[:num_experts]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class _CountInBackward(torch.autograd.Function):
    """The identity; its backward counts.

    For a forward that runs in a backward. Reentrant checkpointing, whose first forward ran without gradients, takes the
    gradients of what it recomputes, so this counts. The other kind has counted in its first forward and only takes the
    saved tensors of what it recomputes: as many as then, so none are saved here.
    """

    @staticmethod
    def forward(ctx, weights, counts, ids):
        ctx.counts, ctx.ids = counts, ids
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, dout):
        ctx.counts += _histogram(ctx.ids, ctx.counts.shape[0])
        return dout, None, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dout):
        return dout * ctx.factor, None


class _Router(nn.Module):
    """``weight [E, hidden]``, and for aux-free balancing ``e_score_correction_bias [E]``, always float32.

    ``expert_counts [E]`` int64 belongs to this process alone, so it is no buffer: DDP would copy rank 0's to all ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        correction_bias: bool,
        router_dtype: torch.dtype | None,
        options: dict[str, Any],
        device: Any,
        dtype: Any,
    ):
        super().__init__()
        self.router_dtype, self.options = router_dtype, options
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        if correction_bias:
            self.register_buffer(
                "e_score_correction_bias", torch.zeros(num_experts, device=device, dtype=torch.float32)
            )
            self.expert_counts = torch.zeros(num_experts, device=device, dtype=torch.int64)
        else:
            self.e_score_correction_bias = self.expert_counts = None

    # tensors, or None without correction_bias
    e_score_correction_bias: Any
    expert_counts: Any

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Routing:
        """Routes ``x [T, hidden]``; tokens with False in ``valid [T]`` get the id -1."""
        dtype = x.dtype if self.router_dtype is None else torch.promote_types(x.dtype, self.router_dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        weights, ids = moe_route(logits, self.e_score_correction_bias, **self.options)
        if valid is not None:
            ids = torch.where(valid[:, None], ids, -1)
        if self.training and self.expert_counts is not None and torch.is_grad_enabled():
            weights = self._count(weights, ids)
        return Routing(logits, weights, ids)

    def _count(self, weights: Tensor, ids: Tensor) -> Tensor:
        self._move_counts(ids.device)
        if not torch.compiler.is_compiling() and _in_backward():
            return _CountInBackward.apply(weights, self.expert_counts, ids)
        _count_choices_(self.expert_counts, ids)
        return weights

    def _move_counts(self, device: torch.device) -> None:
        counts = self.expert_counts
        if counts.device != device:
            self.expert_counts = torch.zeros_like(counts, device=device) if counts.is_meta else counts.to(device)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.expert_counts is not None:
            self._move_counts(self.e_score_correction_bias.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Router:
        names = ("e_score_correction_bias", "expert_counts") if self.expert_counts is not None else ()
        kept = {name: getattr(self, name) for name in names}
        moved = keep_dtype(kept, fn)
        super()._apply(fn, recurse)
        for name, tensor in moved.items():
            setattr(self, name, tensor.zero_() if kept[name].is_meta and not tensor.is_meta else tensor)
        return self


class _Experts(packs.PackableModule):
    """The experts of this process: ``gate_up_proj [E, 2 I, hidden]``, ``down_proj [E, hidden, I]``."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        parallel: Any,
        device: Any,
        dtype: Any,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.activation, self.parallel = activation, parallel
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **factory))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """``x [T, hidden]``, ``ids`` and ``weights [T, k]``, in the order of Hugging Face's experts."""
        packed = packs.packed_weights(self, x, weights)
        if packed is not None:
            (wide,) = library.autocast(x)
            # autocast to another dtype takes the parameters
            if wide.dtype == packed[0].dtype or self.gate_up_proj.is_meta:
                ids = packs.checked(self, ids)
                return moe_experts(wide, packed[0], packed[1], weights, ids, activation=self.activation)
        x, gate_up, down = library.autocast(x, self.gate_up_proj, self.down_proj)
        if self.parallel is not None and self.parallel.average_gradients:
            gate_up, down = (_ScaledGradient.apply(w, 1 / self.parallel.world) for w in (gate_up, down))
        return moe_experts(x, gate_up, down, weights, ids, activation=self.activation)


class _SharedExperts(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, device: Any, dtype: Any):
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size, False, device, dtype)
        self.up_proj = linear(hidden_size, intermediate_size, False, device, dtype)
        self.down_proj = linear(intermediate_size, hidden_size, False, device, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Router, routed experts and shared experts.

    ``logits = x W_gate^T``; ``weights, ids = moe_route(logits, bias)``;
    ``out = sum_j weights_j W_down[e_j] (act(W_gate[e_j] x) * W_up[e_j] x) + shared(x)``.

    Args:
        hidden_size, intermediate_size: width of x, and I of one expert.
        num_experts, top_k: E and k.
        score: ``"softmax"`` (Mixtral, Qwen3, DeepSeek-V2), ``"sigmoid"`` (DeepSeek-V3), ``"sqrtsoftplus"``, ``"none"``.
        renormalize: divide the chosen scores by their sum.
        n_group, topk_group, group_score: group-limited routing; ``"top2"`` for DeepSeek-V3, ``"max"`` for V2.
        routed_scaling_factor: multiplies the weights.
        correction_bias: adds ``gate.e_score_correction_bias``, which steers the selection only and is moved by
            ``update_bias`` (auxiliary-loss-free balancing).
        num_shared_experts: shared experts, together one gated MLP of ``num_shared_experts * intermediate_size``;
            0 for none. shared_intermediate_size: another width of that MLP.
        activation: ``"silu"``, ``"gelu"`` (tanh form) or ``"gelu_erf"``, as in ``tilefuse.moe_experts``. (Hugging Face
            means the erf form by "gelu"; ``from_config`` translates.)
        router_dtype: the logits' dtype is the wider of this and x's; float32 is DeepSeek's. None: x's own, as Qwen3
            and Mixtral have it.
        parallel: a ``tilefuse.distributed.ExpertParallel``; the module then holds the ``E / W`` experts of its rank.
            Its docstring says what data parallelism around that needs.
        initializer_range: standard deviation of ``reset_parameters``.
        device, dtype: of the parameters.

    State dict, as ``DeepseekV3MoE``, ``DeepseekV2Moe``, ``Qwen3MoeSparseMoeBlock`` and ``MixtralSparseMoeBlock`` have
    it: ``gate.weight [E, hidden]``, ``gate.e_score_correction_bias [E]`` float32 (kept so by ``.to(dtype)``),
    ``experts.gate_up_proj [E, 2 I, hidden]`` (gate rows first), ``experts.down_proj [E, hidden, I]``,
    ``shared_experts.{gate,up,down}_proj.weight``.

    Raises:
        ValueError: sizes below 1, top_k or groups that do not fit E, unknown options.

    Example::

        moe = tilefuse.nn.MoE(512, 256, num_experts=64, top_k=6, score="sigmoid", correction_bias=True,
                              num_shared_experts=1)
        y, routing = moe(torch.randn(2, 100, 512), return_routing=True)
        loss = y.square().mean() + 1e-4 * moe.balance_loss(routing, kind="sequence", sequence_length=100)
        loss.backward()
        moe.update_bias(1e-3)

    Sources: DeepSeek-V3 (arXiv 2412.19437) section 2.1.2; Mixtral (2401.04088); Wang et al. (2408.15664).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        n_group: int = 1,
        topk_group: int = 1,
        group_score: str = "top2",
        routed_scaling_factor: float = 1.0,
        correction_bias: bool = False,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        activation: str = "silu",
        router_dtype: torch.dtype | None = torch.float32,
        parallel: Any = None,
        initializer_range: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_positive(
            _NAME, hidden_size=hidden_size, intermediate_size=intermediate_size, num_experts=num_experts, top_k=top_k,
            n_group=n_group, topk_group=topk_group,
        )  # fmt: skip
        if num_experts % n_group:
            errors.value_error(_NAME, "n_group", f"a divisor of num_experts {num_experts}", n_group)
        if topk_group > n_group:
            errors.value_error(_NAME, "topk_group", f"at most n_group {n_group}", topk_group)
        if top_k > topk_group * (num_experts // n_group):
            limit = topk_group * (num_experts // n_group)
            errors.value_error(_NAME, "top_k", f"at most {limit}, the experts of topk_group groups", top_k)
        for arg, value, known in (
            ("score", score, _SCORES), ("group_score", group_score, _GROUP_SCORES),
            ("activation", activation, tuple(_ACTIVATIONS)),
        ):  # fmt: skip
            if value not in known:
                errors.value_error(_NAME, arg, f"one of {', '.join(known)}", value)
        if num_shared_experts < 0:
            errors.value_error(_NAME, "num_shared_experts", "at least 0", num_shared_experts)
        if shared_intermediate_size is None:
            shared_intermediate_size = num_shared_experts * intermediate_size
        elif shared_intermediate_size < 0:
            errors.value_error(_NAME, "shared_intermediate_size", "at least 0", shared_intermediate_size)
        if parallel is not None and parallel.num_experts != num_experts:
            errors.value_error(_NAME, "parallel", f"made for num_experts {num_experts}", parallel.num_experts)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.top_k, self.activation = num_experts, top_k, activation
        self.score, self.renormalize, self.routed_scaling_factor = score, renormalize, routed_scaling_factor
        self.n_group, self.topk_group, self.group_score = n_group, topk_group, group_score
        self.correction_bias, self.router_dtype = correction_bias, router_dtype
        self.parallel, self.initializer_range = parallel, initializer_range
        routing = {
            "top_k": top_k, "score": score, "renormalize": renormalize, "n_group": n_group, "topk_group": topk_group,
            "group_score": group_score, "scale": routed_scaling_factor,
        }  # fmt: skip
        self.gate = _Router(hidden_size, num_experts, correction_bias, router_dtype, routing, device, dtype)
        local = num_experts if parallel is None else parallel.local_experts
        self.experts = _Experts(local, hidden_size, intermediate_size, activation, parallel, device, dtype)
        if shared_intermediate_size:
            self.shared_experts = _SharedExperts(hidden_size, shared_intermediate_size, activation, device, dtype)
        else:
            self.shared_experts = None
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> MoE:
        """The block for a Hugging Face config of type deepseek_v3, deepseek_v2, qwen3_moe or mixtral."""
        kind, act = config.model_type, config.hidden_act
        if act not in _HIDDEN_ACTS:
            errors.value_error(f"{_NAME}.from_config", "hidden_act", f"one of {', '.join(_HIDDEN_ACTS)}", act)
        fields: dict[str, Any] = {
            "activation": _HIDDEN_ACTS[act], "initializer_range": config.initializer_range,
        }  # fmt: skip
        if kind in ("deepseek_v3", "deepseek_v2"):
            fields |= {
                "routed_scaling_factor": config.routed_scaling_factor, "num_shared_experts": config.n_shared_experts,
            }  # fmt: skip
        if kind == "deepseek_v3":
            fields |= {
                "score": "sigmoid", "renormalize": config.norm_topk_prob, "n_group": config.n_group,
                "topk_group": config.topk_group, "correction_bias": True,
            }  # fmt: skip
        elif kind == "deepseek_v2":
            fields["renormalize"] = False
            if config.topk_method == "group_limited_greedy":
                fields |= {"n_group": config.n_group, "topk_group": config.topk_group, "group_score": "max"}
        elif kind == "qwen3_moe":
            fields |= {"renormalize": config.norm_topk_prob, "router_dtype": None}
        elif kind == "mixtral":
            fields["router_dtype"] = None
        else:
            known = "deepseek_v3, deepseek_v2, qwen3_moe or mixtral"
            errors.value_error(f"{_NAME}.from_config", "config", f"of type {known}", kind)
        width = config.intermediate_size if kind == "mixtral" else config.moe_intermediate_size
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        return cls(config.hidden_size, width, experts, config.num_experts_per_tok, **fields | kwargs)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal weights of standard deviation ``initializer_range``, correction bias 0.

        The same seed gives the same weights, also the rank's own part of them under expert parallelism.
        """
        draw_(self._router.weight, self.initializer_range, generator)
        first = 0 if self.parallel is None else self.parallel.rank * self.parallel.local_experts
        experts = _inside(self.experts, _Experts)
        with packs.unpacked(experts):
            for weight in (experts.gate_up_proj, experts.down_proj):
                if self.parallel is None or weight.is_meta:
                    draw_(weight, self.initializer_range, generator)
                else:
                    # drawn for all ranks, so that the random state moves on alike everywhere
                    whole = weight.new_empty(self.num_experts, *weight.shape[1:])
                    draw_(whole, self.initializer_range, generator)
                    with torch.no_grad():
                        weight.copy_(whole[first : first + self.parallel.local_experts])
        if self.correction_bias:
            self._router.e_score_correction_bias.zero_()
            self._router.expert_counts.zero_()
        if self.shared_experts is not None:
            for layer in self.shared_experts.children():
                if isinstance(layer, nn.Linear):
                    reset_linear(layer, self.initializer_range, generator)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """Sends each token through its ``top_k`` experts and the shared ones.

        Args:
            x: ``[.., hidden]`` float32, bfloat16 or float16.
            valid: ``[..]`` bool, False = padding: no expert sees it, and it counts nowhere.
            return_routing: also return the ``Routing`` of the ``T`` flattened tokens, for the losses.

        Returns:
            x's shape and dtype; differentiable in x and all parameters. In training mode with a correction bias and
            gradients switched on, the choices are counted for ``update_bias``: once, also where activation
            checkpointing runs the layer twice (a compiled layer needs ``use_reentrant=False`` for that).

        Raises:
            ValueError: shapes. TypeError: dtypes.
        """
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            errors.value_error(_NAME, "x", f"[.., {self.hidden_size}]", x)
        errors.check_dtype(_NAME, "x", x, errors.FLOATS)
        if valid is not None:
            if valid.shape != x.shape[:-1]:
                errors.value_error(_NAME, "valid", f"{[*x.shape[:-1]]} bool", valid)
            errors.check_dtype(_NAME, "valid", valid, (torch.bool,))
        tokens = x.reshape(-1, self.hidden_size)
        routing = self.gate(tokens, _flat(valid))
        (tokens,) = library.autocast(tokens)
        if self.parallel is None:
            out = self.experts(tokens, routing.ids, routing.weights)
        else:
            self.parallel.check_ddp(self.experts)

            def local(rows: Tensor, ids: Tensor) -> Tensor:
                return self.experts(rows, ids, torch.ones(ids.shape, dtype=torch.float32, device=rows.device))

            out = self.parallel(tokens, routing.weights, routing.ids, local)
        out = out.view(x.shape)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return (out, routing) if return_routing else out

    def pack(self, mode: str = "keep") -> packs.PackedMemory:
        """Packs the experts' weights for inference on a CPU (``tilefuse.pack_weight``): the same bits, sooner.

        Calls that need no gradient then use the packs; others use the parameters as before. An expert's weight that
        changed since (an optimiser's step, ``load_state_dict``, another tensor in its place) is packed again at the
        next such call; in a compiled graph that call raises instead. What is written through ``weight.data`` does not
        count as a change: call ``pack`` again. A copy or a pickle packs its own. The router and the shared experts
        stay as they are.

        Args:
            mode: ``"keep"`` keeps the parameters, beside as much again for the packs. ``"only"`` frees them: they are
                placeholders on the meta device, packed in their own memory where nothing else refers to it, and a call
                that needs a gradient raises RuntimeError. ``state_dict``, ``load_state_dict`` and ``.to`` see them in
                the checkpoint's form all the same. ``.to`` another device or dtype leaves them unpacked there.

        Returns:
            ``(before, after)``: bytes of the experts' weights, packs included. At most one expert's matrix is held
            beside them while packing.

        Raises:
            ValueError: mode; weights that are not bfloat16, not on the CPU, or not parameters of their own (sharded,
            parametrised).

        Example::

            moe = tilefuse.nn.MoE(512, 256, num_experts=64, top_k=6, dtype=torch.bfloat16).eval()
            print(moe.pack("only"))
            with torch.no_grad():
                y = moe(torch.randn(1, 512, dtype=torch.bfloat16))
        """
        sources = (packs.Source("gate_up_proj"), packs.Source("down_proj"))
        return packs.pack(f"{_NAME}.pack", _inside(self.experts, _Experts), sources, mode)

    def unpack(self) -> MoE:
        """Takes ``pack`` back: the packs go, freed parameters are there again. Returns self."""
        packs.unpack(_inside(self.experts, _Experts))
        return self

    @property
    def _router(self) -> _Router:
        return _inside(self.gate, _Router)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3, group: Any = None) -> None:
        """Moves the correction bias against the load since the last call, once per optimiser step.

        ``bias += rate * sign(mean(counts) - counts)``; the counts then start again at 0.

        Args:
            rate: step size.
            group: a ``torch.distributed`` group over which the counts are summed first; None with ``parallel`` is
                its group, else no communication: under data parallelism name the group, the counts are each rank's own.

        Raises:
            ValueError: the module has no correction bias.
        """
        if not self.correction_bias:
            errors.value_error(f"{_NAME}.update_bias", "correction_bias", "True in the constructor", False)
        bias, counts = self._router.e_score_correction_bias, self._router.expert_counts
        parallel: Any = self.parallel
        if group is not None or parallel is not None:
            torch.distributed.all_reduce(counts, group=parallel.group if group is None else group)
        bias.copy_(moe_update_bias(bias, counts, rate=rate))
        counts.zero_()

    def balance_loss(self, routing: Routing, valid: Tensor | None = None, **options: Any) -> Tensor:
        """``tilefuse.moe_balance_loss`` with this module's score; ``valid [..]`` bool, options as there (``kind``)."""
        options = {"score": self.score} | options
        return moe_balance_loss(routing.logits, routing.ids, _flat(valid), **options)

    def z_loss(self, routing: Routing, valid: Tensor | None = None) -> Tensor:
        """``tilefuse.moe_z_loss`` of the router's logits; ``valid [..]`` bool."""
        return moe_z_loss(routing.logits, _flat(valid))

    def extra_repr(self) -> str:
        parts = [
            f"{self.hidden_size}, {self.intermediate_size}, num_experts={self.num_experts}, top_k={self.top_k}",
            f"score={self.score}, renormalize={self.renormalize}, activation={self.activation}",
        ]
        if self.n_group > 1:
            parts.append(f"n_group={self.n_group}, topk_group={self.topk_group}, group_score={self.group_score}")
        if self.routed_scaling_factor != 1:
            parts.append(f"routed_scaling_factor={self.routed_scaling_factor}")
        if self.correction_bias:
            parts.append("correction_bias=True")
        if self.parallel is not None:
            parts.append(f"local_experts={self.parallel.local_experts}")
        return ", ".join(parts)


def _inside(module: nn.Module, cls: type[nn.Module]) -> Any:
    """The part of a block itself, whatever adapters have put around it."""
    return next(m for m in module.modules() if isinstance(m, cls))


def _flat(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.reshape(-1)
