"""Latent diffusion: one training step and one sampling call for every system. THE page to read.

Rombach et al. 2022, section 3: a first stage maps pixels to latents, a backbone learns to remove
noise from them, told by conditions. What differs between systems is in the plugins; nothing here
branches on a name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sandbox.config.wiring import Wiring
from sandbox.contracts import (
    Backbone,
    Batch,
    Clip,
    Conditioner,
    Conditions,
    Draws,
    FirstStage,
    Hooks,
    Posterior,
    Sampler,
    Terms,
)
from sandbox.data.loader import told
from sandbox.model.components import DTYPES, Parts
from sandbox.model.offload import absent, frozen_in, present
from sandbox.model.sampling import denoise
from sandbox.model.trainable import Trainable, freeze

pytree.register_dataclass(Conditions)


class LatentDiffusion(Trainable):
    """A wired system: components as attributes, `training_step`, `sample`.

    Pixels and latents are (B, C, T, H, W).
    """

    first_stage: FirstStage  # these three are modules
    conditioner: Conditioner
    backbone: Backbone

    def __init__(self, wiring: Wiring, parts: Parts, group: int) -> None:
        super().__init__(wiring.root, group)
        self.wiring = wiring
        self.first_stage = freeze(parts.first_stage)
        self.conditioner = parts.conditioner
        self.backbone = parts.backbone
        self.schedule, self.loss = parts.schedule, parts.loss
        self.sampler, self.guidance = parts.sampler, parts.guidance
        self.adapter = parts.adapter
        self.hold_still()

    def base_state(self) -> dict[str, Tensor]:
        """The backbone's own weights by their own names, also below an adapter."""
        state, adapter = self.backbone.state_dict(), self.adapter  # type: ignore[attr-defined]
        if adapter is None:
            return state
        return {own: x for name, x in state.items() if (own := adapter.published_name(name))}

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As usual; with trainer.low_vram what is frozen stays on the CPU."""
        with absent(self.lodgers(self.first_stage, self.conditioner)):
            return super().to(*args, **kwargs)

    def at_work(self, part: Any) -> AbstractContextManager[Any]:
        """With all of `part` on the device, where trainer.low_vram leaves some on the CPU."""
        return present(self.lodgers(part), self.device)

    def lodgers(self, *parts: Any) -> list[Any]:
        """What waits on the CPU until it is needed."""
        is_tight = self.root.trainer.low_vram
        return [module for part in parts for module in frozen_in(part)] if is_tight else []

    def narrow(self) -> AbstractContextManager[Any]:
        """Computes in the dtype of a frozen backbone, also where the trainer's autocast is not."""
        dtype = DTYPES[self.root.precision]
        if self.adapter is None or dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype)

    def training_step(self, batch: Batch, index: int = 0) -> Tensor:
        terms = self.step(batch, self.draws(batch))
        self.note(terms)
        return terms.total

    def step(self, batch: Batch, draws: Draws) -> Terms:
        """The loss of one micro-batch; `draws` holds all randomness, so a recorded step replays."""
        z0 = self.latents(batch, draws)  # (B, C, T, H, W), scaled
        drop, encode = self.conditioner.drop(draws), self.encoder(draws)
        with self.at_work(self.conditioner):
            cond = self.conditioner(batch, clip_of(z0), drop, draws, encode, z0)
        t, eps = self.schedule.draw_t(draws), draws.normal("noise", z0)
        with self.narrow():
            out = self.backbone(*self.schedule.inputs(self.schedule.noised(z0, eps, t), t), cond)
        return self.loss(self.schedule, out, z0, eps, t)

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Scaled latents (B, C, T, H, W) on the backbone's grid, from pixels or from a cache."""
        with torch.no_grad(), self.at_work(self.first_stage):
            posterior = (
                self.encoded(batch.video)
                if batch.video is not None
                else self.first_stage.posterior(batch.stored)  # type: ignore[arg-type]
            )
            z = self.first_stage.scaled(sampled(posterior, draws, "posterior"))
        padding = self.grid(clip_of(z)).frames - z.shape[2]
        return torch.cat([z[:, :, :1].expand(-1, -1, padding, -1, -1), z], 2) if padding else z

    def encoded(self, pixels: Tensor) -> Posterior:
        """What the first stage says of (B, 3, T, H, W), all at once or one by one."""
        if not self.root.vae.one_by_one:
            return self.first_stage.encode(pixels)
        stored = [self.first_stage.encode(one).stored for one in pixels.split(1)]
        return self.first_stage.posterior(torch.cat(stored))

    def encoder(self, draws: Draws) -> Callable[[Tensor, str], Tensor]:
        """What conditioning may ask of the first stage: (pixels, name of the draw) -> latents."""

        @torch.no_grad()
        def encode(pixels: Tensor, name: str) -> Tensor:
            with self.at_work(self.first_stage):
                return self.first_stage.scaled(sampled(self.encoded(pixels), draws, name))

        return encode

    def grid(self, z: Clip) -> Clip:
        return self.root.backbone.grid(z)

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        clip: Clip | None = None,
        steps: int | None = None,
        hooks: Hooks | None = None,
        progress: Callable[[int, int], None] | None = None,
        sampler: Sampler | None = None,
    ) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1] for the captions, images and scalars of `batch`.

        `clip` is the size in pixels (default: the first of the data), `sampler` another than the
        system's; randomness is that of the batch's positions. The caller has set eval mode.
        """
        batch = self.transfer_batch_to_device(replace(batch), self.device)
        clip = clip or self.wiring.clips[0]
        batch.scalars = batch.scalars | told(clip, batch.size, self.device)
        z_clip = self.root.vae.latents(clip)
        grid, draws = self.grid(z_clip), self.draws(batch)
        signals, encode = self.root.conditioning.signals(), self.encoder(draws)

        def conditions_of(dropped: frozenset[str]) -> Conditions:
            drop = {s: torch.full((batch.size,), s in dropped, device=self.device) for s in signals}
            return self.conditioner(batch, grid, drop, draws, encode, None)

        size = (batch.size, grid.channels, grid.frames, grid.height, grid.width)
        with self.at_work(self.conditioner):
            conditions = [conditions_of(dropped) for dropped in self.guidance.passes(signals)]
        with self.narrow():
            z = denoise(
                self.backbone, self.schedule, self.guidance, conditions, sampler or self.sampler,
                draws.normal("start", torch.empty(size, device=self.device)),
                steps or self.root.sampler.steps, draws, hooks, progress,
            )  # fmt: skip
        with self.at_work(self.first_stage):
            video = self.first_stage.decode(z[:, :, grid.frames - z_clip.frames :], draws)
        return video.clamp(-1, 1)


def sampled(posterior: Posterior, draws: Draws, name: str) -> Tensor:
    """Unscaled latents of a posterior; a draw only where it needs one."""
    if not posterior.is_random:
        return posterior.mean
    return posterior.sample(draws.normal(name, posterior.mean))


def clip_of(z: Tensor) -> Clip:
    return Clip(*z.shape[1:])


def prompts_batch(
    captions: list[str], device: Any = "cpu", epoch: int = 0, start: int = 0, **fields: Any
) -> Batch:
    """A batch to sample from: caption i has position start + i, which keys its noise."""
    position = torch.arange(start, start + len(captions), device=device)
    return replace(Batch(captions=captions, ids=captions, epoch=epoch, position=position), **fields)
