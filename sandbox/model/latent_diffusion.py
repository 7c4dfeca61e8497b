"""Latent diffusion: the training step and the sampling loop of every system in this project.

A first stage encodes a clip to latents z0. A schedule adds noise, z_t = alpha(t) z0 + sigma(t) eps.
A backbone learns to undo it from z_t, the time t and the conditions; sampling starts from noise,
removes it step by step and decodes the result (Rombach et al. 2022, section 3).
All choices are in the plugins; nothing here branches on a plugin's name.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sandbox.config.wiring import Wiring
from sandbox.contracts import (
    AVERAGE,
    STUDENT,
    Backbone,
    Batch,
    Clip,
    Conditioner,
    Conditions,
    CriticMethod,
    Draws,
    FirstStage,
    Hooks,
    Pass,
    Posterior,
    Sampler,
    Schedule,
    Terms,
)
from sandbox.data.batching import size_scalars
from sandbox.model.components import DTYPES, Parts
from sandbox.model.networks import MicroBatch, Networks, check_modules, dropped_signals
from sandbox.model.offload import freeze, frozen_in, weights_on, without_weights
from sandbox.model.roles import AverageNetwork
from sandbox.model.sampling import denoise
from sandbox.model.trainable import Trainable


class LatentDiffusion(Trainable):
    """A system built from wired components. Pixels and latents are (B, C, T, H, W)."""

    first_stage: FirstStage  # these three are modules
    conditioner: Conditioner
    backbone: Backbone

    def __init__(self, wiring: Wiring, parts: Parts, group: int) -> None:
        super().__init__(wiring.root, group)
        self.wiring = wiring
        self.first_stage = freeze(parts.first_stage)
        self.conditioner, self.backbone = parts.conditioner, parts.backbone
        self.schedule, self.loss, self.method = parts.schedule, parts.loss, parts.method
        self.sampler, self.guidance = parts.sampler, parts.guidance
        self.adapter = parts.adapter
        self.features = parts.features
        if parts.features is not None and not wiring.root.features.fit_clips():
            freeze(parts.features)  # fitted ones are in checkpoints
        self.guides = nn.ModuleDict()  # networks of the guidance beside the student
        check_modules(parts.backbone, parts.method.cfg.features(), "method.features")
        check_modules(parts.backbone, parts.guidance.cfg.skipped(), "guidance.skip")
        self.freeze_untrained()

    def training_step(self, batch: Batch, index: int = 0) -> Tensor:
        terms = self.step(batch, self.draws(batch))
        self.record(terms)
        return terms.total

    def step(self, batch: Batch, draws: Draws) -> Terms:
        """The loss of one micro-batch. All randomness is in `draws`: a recorded step replays."""
        example = MicroBatch(self, batch, draws)
        return self.method(Networks(self, example), example, draws)

    def update_networks(
        self, batch: Batch, share: float, rate: float, is_update: bool
    ) -> list[str]:
        draws, skipped = self.draws(batch), []
        for name, update in self.updates.items():
            losses = []
            for turn in range(self.root.method.roles()[name].turns):
                example = MicroBatch(self, batch, draws)
                given = name, turn, Networks(self, example), example, draws
                loss = partial(cast(CriticMethod, self.method).update, *given)
                terms, is_skipped = update.step(loss, share, rate, is_update)
                losses.append(terms.total.detach())
                skipped += [name] if is_skipped else []
            self.metrics = self.metrics | {f"{name}_loss": torch.stack(losses).mean()}
        return skipped

    def network(self, role: str) -> Any:
        """The `backbone` and `conditioner` of a role of the training method."""
        if role == STUDENT:
            return self
        if self.root.method.roles()[role].kind == AVERAGE:
            assert self.ema is not None  # wiring requires one
            return AverageNetwork(self, self.ema)
        return self.networks[role]

    def latents(self, batch: Batch, draws: Draws) -> Tensor:
        """Scaled latents (B, C, T, H, W), encoded or cached, padded to the backbone's grid."""
        with torch.no_grad(), self.on_device(self.first_stage):
            posterior = (
                self.encode_pixels(batch.video)
                if batch.video is not None
                else self.first_stage.posterior(batch.stored)  # type: ignore[arg-type]
            )
            z = self.first_stage.scaled(sample_posterior(posterior, draws, "posterior"))
        padding = self.root.backbone.grid(clip_of(z)).frames - z.shape[2]
        return torch.cat([z[:, :, :1].expand(-1, -1, padding, -1, -1), z], 2) if padding else z

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

        `clip` is the size in pixels (default: the first size of the data); `sampler` replaces that
        of the system. The batch's positions key the noise. The caller sets eval mode.
        """
        batch = self.transfer_batch_to_device(batch, self.device)
        clip = clip or self.wiring.clips[0]
        batch.scalars = batch.scalars | size_scalars(clip, batch.size, self.device)
        z_clip = self.root.vae.latents(clip)
        grid, draws = self.root.backbone.grid(z_clip), self.draws(batch)
        signals, encode = self.root.conditioning.signals(), self.encoder(draws)

        size = (batch.size, grid.channels, grid.frames, grid.height, grid.width)
        start = draws.normal("start", torch.empty(size, device=self.device))

        networks: dict[str, Any] = {STUDENT: self, **self.guides}

        @cache
        def conditions(dropped: frozenset[str], role: str) -> Conditions:
            drop, conditioner = dropped_signals(signals, dropped, start), networks[role].conditioner
            with self.on_device(conditioner):
                return conditioner(batch, grid, drop, draws, encode, None)

        passes = [as_pass(p) for p in self.guidance.passes(signals)]
        conditioned = [(p, conditions(p.dropped, p.role)) for p in passes]
        with self.autocast(), self.on_device(self.guides):
            z = denoise(
                self.backbone, self.schedule_for(grid), self.guidance, conditioned,
                sampler or self.sampler, start, steps or self.root.sampler.steps, draws, hooks,
                progress, self.root.method.scalars(),
                {role: guide.backbone for role, guide in self.guides.items()},  # type: ignore[misc]
            )  # fmt: skip
        with self.on_device(self.first_stage):
            video = self.first_stage.decode(z[:, :, grid.frames - z_clip.frames :], draws)
        return video.clamp(-1, 1)

    @torch.no_grad()
    def features_of(self, video: Tensor, frames: int) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, frames, h, w): features of evenly spaced frames.

        `frames`: those of the latents, whose padding in front belongs to frame 0.
        """
        own = self.root.vae.latents(clip_of(video)).frames
        index = [0] * (frames - own) + torch.linspace(0, video.shape[2] - 1, own).round().tolist()
        images = video[:, :, [*map(int, index)]].transpose(1, 2).flatten(0, 1)
        with self.on_device(self.features):
            found = self.features(images)  # type: ignore[misc]  # wiring requires it
        return found.unflatten(0, (len(video), frames)).transpose(1, 2)

    def schedule_for(self, grid: Clip) -> Schedule:
        """The schedule for latents of this size, where it depends on the size."""
        if not self.root.schedule.depends_on_size():
            return self.schedule
        return self.schedule.for_size(grid)  # type: ignore[attr-defined]

    def encode_pixels(self, pixels: Tensor) -> Posterior:
        """The posterior of (B, 3, T, H, W); clips are encoded one at a time with vae.one_by_one."""
        if not self.root.vae.one_by_one:
            return self.first_stage.encode(pixels)
        stored = [self.first_stage.encode(one).stored for one in pixels.split(1)]
        return self.first_stage.posterior(torch.cat(stored))

    def encoder(self, draws: Draws) -> Callable[[Tensor, str], Tensor]:
        """The function with which conditioning encodes images: (pixels, draw name) -> latents."""

        @torch.no_grad()
        def encode(pixels: Tensor, name: str) -> Tensor:
            with self.on_device(self.first_stage):
                posterior = self.encode_pixels(pixels)
                return self.first_stage.scaled(sample_posterior(posterior, draws, name))

        return encode

    def base_state(self) -> dict[str, Tensor]:
        """The backbone's own weights under their own names, without those of an adapter."""
        state, adapter = self.backbone.state_dict(), self.adapter  # type: ignore[attr-defined]
        if adapter is None:
            return state
        return {own: x for name, x in state.items() if (own := adapter.published_name(name))}

    # devices and precision

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch, but with trainer.low_vram frozen modules stay on the CPU."""
        parts = self.first_stage, self.conditioner, self.networks, self.guides, self.features
        with without_weights(self.offloaded_modules(*parts)):
            return super().to(*args, **kwargs)

    def on_device(self, part: Any) -> AbstractContextManager[Any]:
        """Copies the offloaded modules of `part` to the device inside the block."""
        return weights_on(self.device, self.offloaded_modules(part))

    def offloaded_modules(self, *parts: Any) -> list[Any]:
        """The frozen modules of `parts`, which trainer.low_vram keeps on the CPU."""
        is_on = self.root.trainer.low_vram
        found = (
            [part for part in parts if part is not None] if is_on else []
        )  # features are optional
        return [module for part in found for module in frozen_in(part)]

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the dtype of a frozen backbone, for calls outside the trainer's autocast."""
        dtype = DTYPES[self.root.precision]
        if self.adapter is None or dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype)


def as_pass(p: Any) -> Pass:
    """A pass; guidance plugins of version 0.1 return the dropped signals alone."""
    return p if isinstance(p, Pass) else Pass(frozenset(p))


def sample_posterior(posterior: Posterior, draws: Draws, name: str) -> Tensor:
    """Unscaled latents (B, C, T, H, W) of a posterior; noise is drawn only where it is used."""
    if not posterior.is_random:
        return posterior.mean
    return posterior.sample(draws.normal(name, posterior.mean))


def clip_of(z: Tensor) -> Clip:
    return Clip(*z.shape[1:])


def prompts_batch(
    captions: list[str], device: Any = "cpu", epoch: int = 0, start: int = 0, **fields: Any
) -> Batch:
    """A batch for sampling: caption i has position start + i, which keys its noise."""
    position = torch.arange(start, start + len(captions), device=device)
    return replace(Batch(captions=captions, ids=captions, epoch=epoch, position=position), **fields)
