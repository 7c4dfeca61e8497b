"""What a training method receives in a planned step: networks, an example and draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad

from sandbox.contracts import STUDENT, BackboneConfig, Clip, Conditions, Output
from sandbox.model.networks import captured, in_grid

if TYPE_CHECKING:
    from sandbox.plan.build import Sizes


class PlannedModel:
    """The `Model` of a planned step: calls the backbones as `model.networks` does.

    Forward-mode derivatives, which fake tensors lack, are counted as a second call.
    """

    def __init__(
        self, parts: dict[str, Any], backbones: Mapping[str, Any], student: BackboneConfig
    ) -> None:
        self.schedule, self.loss, self.backbones = parts["schedule"], parts["loss"], backbones
        self.student = student

    def __call__(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Conditions,
        features: tuple[str, ...] = (),
        scalars: Mapping[str, Tensor] | None = None,
        role: str = STUDENT,
    ) -> Output:
        (z_t, tangent), t = forward_ad.unpack_dual(z_t), forward_ad.unpack_dual(t).primal
        if tangent is not None:
            first, second = (self(z_t, t, cond, features, role=role).raw for _ in range(2))
            return Output(forward_ad.make_dual(first, second))
        backbone = self.backbones.get(role, self.backbones[STUDENT])
        inputs = self.schedule.inputs(z_t, t)
        average = torch.no_grad() if role not in self.backbones else nullcontext()
        with average, captured(backbone, features) as found:
            raw = backbone(*inputs, cond)
        return Output(raw, in_grid(found, z_t, self.student) if role == STUDENT else found)


@torch.no_grad()
def planned_features(encoder: Any, z0: Tensor, clip: Clip) -> Tensor:
    """Features (B, D, T, h, w) of one frame for each of the latents z0."""
    images = torch.empty(len(z0) * z0.shape[2], 3, clip.height, clip.width)
    return encoder(images).unflatten(0, (len(z0), -1)).transpose(1, 2)


@dataclass(frozen=True)
class PlannedExample:
    """The `Example` of a planned step; its conditions are the same whatever is dropped."""

    z0: Tensor
    conds: Mapping[str, Conditions]  # by role
    signals: tuple[str, ...]
    read: Callable[[], Tensor]  # the features of clean frames
    video: Tensor | None = None

    @property
    def features(self) -> Tensor:
        return self.read()

    def conditions(self, drop: frozenset[str] | None = None, role: str = STUDENT) -> Conditions:
        return self.conds.get(role, self.conds[STUDENT])


def conditions(sizes: Sizes, requires_grad: bool = False) -> Conditions:
    """Empty condition tensors of the backbone's input shapes."""
    slots, grid, batch = sizes.slots, sizes.grid, sizes.batch
    names = slots.scalars | slots.time_scalars
    cond = Conditions(scalars={name: torch.empty(batch) for name in names})
    if slots.context is not None:
        size = (batch, slots.context.length, slots.context.width)
        cond.context = torch.empty(size, requires_grad=requires_grad)
        if slots.context.masked:
            cond.context_mask = torch.empty(size[:2], dtype=torch.bool)
    if (image := slots.image_context) is not None:
        size = (batch, image.frames, image.length, image.width)
        cond.image_context = torch.empty(size, requires_grad=requires_grad)
    if slots.concat:
        cond.concat = torch.empty(batch, slots.concat, grid.frames, grid.height, grid.width)
    if slots.vector:
        cond.vector = torch.empty(batch, slots.vector, requires_grad=requires_grad)
    return cond


class EmptyDraws:
    """Random draws as empty tensors."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def normal(self, name: str, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    def uniform(self, name: str) -> Tensor:
        return torch.empty(self.batch)

    stratified = uniform

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """The largest value, as the method may make as many calls of a network."""
        with unset_fake_temporarily():
            return torch.full((self.batch,), high - 1)

    def shared(self, over: str = "micro_batch") -> EmptyDraws:
        return self
