"""Measures operations and memory over time of a training step on fake tensors.

Fake tensors have shapes, dtypes and lifetimes but no values. The step runs the real code, with
autograd, autocast and activation checkpointing: operations and live storages are counted, not
modelled. torch's FlopCounterMode counts operations only; the memory timeline is our own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass
class Measured:
    """One micro-batch. Numbers are floating-point operations and bytes.

    forward, backward: operations without `repeated`, the recomputation of checkpointing; held:
    bytes saved for the backward pass; peak: maximum of temporary bytes, without gradients; moments:
    (temporary bytes, gradient bytes) at each allocation, the first `turn` of them in the forward
    pass.
    """

    forward: int = 0
    backward: int = 0
    repeated: int = 0
    held: int = 0
    peak: int = 0
    moments: list[tuple[int, int]] = field(default_factory=list)
    turn: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.repeated

    def then(self, rest: Measured) -> Measured:
        """The sum of both; of this one's tensors only the inputs of `rest` stay alive."""
        return Measured(
            forward=self.forward + rest.forward,
            backward=rest.backward,
            repeated=rest.repeated,
            held=rest.held,
            peak=max(self.peak, rest.peak),
            moments=self.moments + rest.moments,
            turn=self.turn + rest.turn,
        )

    def and_then(self, update: Measured, times: int) -> Measured:
        """The sum with `times` updates of another network; no tensors stay alive between them."""
        return Measured(
            forward=self.forward + times * update.forward,
            backward=self.backward + times * update.backward,
            repeated=self.repeated + times * update.repeated,
            held=max(self.held, update.held),
            peak=max(self.peak, update.peak),
            moments=self.moments + update.moments,
            turn=self.turn,
        )

    def largest(self, share: float) -> int:
        """Peak of temporary bytes plus a `share` of the gradients."""
        return max((int(other + share * own) for other, own in self.moments), default=0)


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes of all live storages."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.gradients = self.operations = self.repeated = self.peak = 0
        self.in_backward = False
        self.moments: list[tuple[int, int]] = []
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # .item() of a fake tensor
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # a shortcut: two thirds of all calls
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        count = formula(func)
        if count is not None:
            operations = count(*args, **kwargs, out_val=out)
            self.operations += operations
            # recomputation runs with grad enabled, autograd's own backward does not
            self.repeated += operations if self.in_backward and torch.is_grad_enabled() else 0
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.take(tensor)
        return out

    def take(self, tensor: Tensor) -> None:
        """Counts the storage of `tensor` until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.live += size
        self.peak = max(self.peak, self.live - self.gradients)
        self.moments.append((self.live - self.gradients, self.gradients))

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def formula(func: Any) -> Callable[..., int] | None:
    """torch's FLOP formula of an operator, or that of our fused kernels; None without one."""
    found = flop_registry.get(func._overloadpacket)
    return found or OWN.get(func._schema.name)


def _temporal(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(*(_per_position(x.shape) for x in (q, k, v)))


def _temporal_backward(g: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(*(_per_position(x.shape) for x in (g, q, k, v)))


def _per_position(shape: Sequence[int]) -> tuple[int, ...]:
    """(B, T, S, H, D) of temporal attention as plain attention: (B*S, H, T, D)."""
    b, t, s, h, d = shape
    return b * s, h, t, d


OWN: dict[str, Callable[..., int]] = {  # normalisation counts as 0, as in torch
    "sandbox_kernels::temporal_attention": _temporal,
    "sandbox_kernels::temporal_attention_backward": _temporal_backward,
}


class LikeCUDA(TorchFunctionMode):
    """Makes CPU tensors follow CUDA's behaviour where it affects memory.

    Attention uses fused operators, which store no scores, unless the code chose torch's math
    backend, and autocast keeps norms and exponentials in float32 (torch's list of CUDA operations).
    """

    WIDE = frozenset({
        F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.mse_loss, F.l1_loss, torch.softmax,
        torch.exp, torch.log, torch.pow, torch.rsqrt, torch.sum, torch.prod, torch.cumsum,
        Tensor.softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.rsqrt, Tensor.sum, Tensor.prod,
        Tensor.cumsum, Tensor.norm,
    })  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_fused = torch.backends.cuda.mem_efficient_sdp_enabled()
        if func is F.scaled_dot_product_attention and is_fused:
            return self.attention(*args, **kwargs)
        if func in self.WIDE and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            narrow = torch.get_autocast_dtype("cpu")
            query, key, value = (x.to(narrow) for x in (query, key, value))
        if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if attn_mask is not None:
            size = (*query.shape[:3], key.shape[2])
            attn_mask = attn_mask.to(query.dtype).expand(size)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


@contextmanager
def on_fake_device(*modules: nn.Module) -> Iterator[None]:
    """Makes new tensors fake CPU tensors in the block, and replaces those of `modules` for good."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        known: dict[Any, Any] = {None: None}  # tied weights stay tied
        for tensor in {x for m in modules for x in (*m.parameters(), *m.buffers())}:
            known[tensor] = torch.empty_like(
                tensor, device="cpu", requires_grad=tensor.requires_grad
            )
        for module in nn.ModuleList(modules).modules():
            for own in (module._parameters, module._buffers):
                own.update({name: known[tensor] for name, tensor in own.items()})
        yield


def measure(
    step: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    inputs: Sequence[Tensor] = (),
    autocast: torch.dtype | None = None,
    is_cuda: bool = True,
) -> Measured:
    """Measures `step`, which returns a loss (), and its backward pass, inside `on_fake_device`.

    Tensors of `modules` and `inputs` exist before and are not counted.
    """
    meter, found = Meter(), Measured()
    trained = {id(p): p for m in modules for p in m.parameters() if p.requires_grad}

    def grown(parameter: Tensor) -> None:
        assert parameter.grad is not None  # set before this hook runs
        meter.gradients += parameter.grad.untyped_storage().nbytes()

    hooks = [p.register_post_accumulate_grad_hook(grown) for p in trained.values()]
    narrow = torch.autocast("cpu", autocast) if autocast else nullcontext()
    with LikeCUDA() if is_cuda else nullcontext(), meter:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                meter.take(tensor)
        for tensor in inputs:
            meter.take(tensor)
        static, meter.peak = meter.live, meter.live
        meter.moments.clear()
        with narrow:
            loss = step()
        found.forward, found.held = meter.operations, meter.live - static
        found.turn = len(meter.moments)
        meter.in_backward = True
        if loss.requires_grad:
            # Tensor.backward calls this too, but disables LikeCUDA, so that the recomputation of
            # checkpointing would differ from the forward pass.
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), True, True
            )
    found.repeated = meter.repeated
    found.backward = meter.operations - found.forward - meter.repeated
    found.peak = meter.peak - static
    found.moments = [(other - static, own) for other, own in meter.moments]
    for hook in hooks:
        hook.remove()
    for parameter in trained.values():
        parameter.grad = None
    return found
