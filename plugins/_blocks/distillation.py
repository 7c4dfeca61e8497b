"""What a teacher predicts in a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from sandbox.contracts import Denoised, Example, Model


@torch.no_grad()
def guided(
    model: Model, example: Example, z_t: Tensor, t: Tensor, role: str, guidance_scale: float
) -> Denoised:
    """Estimates of a role with classifier-free guidance, one or two passes."""
    full = model(z_t, t, example.conditions(frozenset(), role), role=role).raw
    if guidance_scale != 1:
        none = example.conditions(frozenset(example.signals), role)
        uncond = model(z_t, t, none, role=role).raw
        full = uncond + guidance_scale * (full - uncond)
    return model.schedule.denoised(full, z_t, t)
