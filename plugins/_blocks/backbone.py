"""Input checks that all backbones share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sandbox.contracts import Clip, Conditions


def wired_number(cfg: object, name: str) -> int:
    """A Config field that wiring fills; raises ValueError while it is null."""
    number = getattr(cfg, name)
    if number is None:
        raise ValueError(f"backbone.{name} is null: wiring fills it, or set it to a number")
    return number


def by_time(embed: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Embeds times (B,) -> (B, D), or times of frames (B, T) -> (B, T, D)."""
    return embed(t.flatten()).unflatten(0, t.shape)


def by_frame(x: Tensor, like: Tensor) -> Tensor:
    """x (B, D) with a frame axis where `like` (B, D) or (B, T, D) has one."""
    return x if like.ndim == 2 else x[:, None]


def with_concat(z_t: Tensor, cond: Conditions) -> Tensor:
    """`z_t` and the channels of `cond.concat`, if any: (B, C + C', T, H, W)."""
    return z_t if cond.concat is None else torch.cat((z_t, cond.concat), 1)


def latent_size(z: Tensor, channels: int | None) -> Clip:
    """Size of z (B, channels, T, H, W); raises ValueError for other shapes."""
    if z.ndim != 5 or z.shape[1] != channels:
        want = f"(B, {channels}, T, H, W)"
        raise ValueError(f"backbone: latents have shape {tuple(z.shape)}: want {want}")
    return Clip(*z.shape[1:])


def context_width(cond: Conditions) -> int:
    """Width of the context tokens; 0 without them."""
    return 0 if cond.context is None else cond.context.shape[-1]


def vector_width(cond: Conditions) -> int:
    """Width of the pooled vector; 0 without it."""
    return 0 if cond.vector is None else cond.vector.shape[-1]


def check_sizes(cfg: object, sizes: dict[str, int]) -> None:
    """Compares sizes of the inputs with the Config fields of these names; raises ValueError."""
    for name, size in sizes.items():
        stated = getattr(cfg, name)
        if size != (stated or 0):
            raise ValueError(f"backbone.{name}={stated}, but the inputs have {size}")


def refuse_image_context(backbone: str, cond: Conditions) -> None:
    """Raises ValueError for image tokens, which the plugin `backbone` has no layers for."""
    if cond.image_context is not None:
        raise ValueError(f"backbone={backbone} takes no image_context")
