"""Any known frames of a clip as conditions: prediction, interpolation, extension to either side.

Masked conditional video diffusion (Voleti et al. 2022, 2205.09853; Hoeppe et al. 2022, 2206.07696):
the frames that are known are drawn for each clip. As in SEINE (Chen et al. 2023, 2310.20700,
section 3.2), the latents of the masked clip and the mask are concatenated to the noisy latents. As
in Wan (2025, 2503.20314, section 5.1), a latent frame has a mask channel for each of its frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from plugins._configs.frame_masks import frames_per_latent, places
from sandbox.contracts import (
    Batch,
    Clip,
    ConditioningConfig,
    Conditions,
    ConfigError,
    Draws,
    Encode,
    Slots,
    in_range,
)
from sandbox.registry import register

KINDS = ("prediction", "interpolation", "backward", "scattered")


@register("conditioning", "inpaint_frames")
class InpaintFrames(nn.Module):
    """Known frames: their latents and a mask as channels; prediction, interpolation, extension."""

    @dataclass
    class Config(ConditioningConfig):
        """prediction, interpolation, backward, scattered: weights of the kinds of masks that
        training draws for each clip. The first frames are known, the first and the last ones, the
        last ones, or each frame by itself. max_known: most known frames at an end; null: all but
        one. drop_frames: probability that training knows no frame, so that guidance can drop them.

        known: known frames of a sample, from 0, or negative from the last one. They are those of
        validation clips, or of task.videos: files of the known frames, or of whole clips. For [0]
        and [0,-1], task.images and task.end_images. frames: of a clip, filled by wiring.
        mask_channels: pixel frames for each latent frame; null derives it from their numbers.
        """

        may_differ: ClassVar[tuple[str, ...]] = (
            *KINDS,
            "max_known",
            "drop_frames",
            "known",
            "frames",
        )

        prediction: float = 1.0
        interpolation: float = 1.0
        backward: float = 1.0
        scattered: float = 1.0
        max_known: int | None = None
        drop_frames: float = 0.1
        known: tuple[int, ...] = (0,)
        frames: int | None = None
        mask_channels: int | None = None

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in KINDS:
                yield from in_range(name, getattr(self, name), 0, 1e6)
            if not any(self.weights()):
                yield f"prediction=0: one of {', '.join(KINDS)} must be more than 0"
            yield from in_range("max_known", self.max_known, 1)
            yield from in_range("drop_frames", self.drop_frames, 0, 1)
            yield from in_range("frames", self.frames, 1)
            yield from in_range("mask_channels", self.mask_channels, 1)

        def weights(self) -> tuple[float, ...]:
            return tuple(getattr(self, name) for name in KINDS)

        def needs(self) -> frozenset[str]:
            return frozenset({"video"})

        def encodes(self) -> bool:
            return True

        def signals(self) -> tuple[str, ...]:
            return ("frames",)

        def images(self) -> tuple[str, ...]:
            simple = {(): (), (0,): ("start",), (0, -1): ("start", "end")}
            return simple.get(tuple(self.known), ("video",))

        def known_frames(self, frames: int) -> tuple[int, ...]:
            return places(self.known, frames)

        def offers(self, clip: Clip, grid: Clip) -> Slots:
            return Slots(concat=grid.channels + (self.mask_channels or 1))

        def wired(self, clip: Clip, grid: Clip) -> Self:
            channels = self.mask_channels or frames_per_latent(clip.frames, grid.frames)
            if channels * grid.frames < clip.frames:
                raise ConfigError(
                    f"mask_channels={channels}: {clip.frames} frames become {grid.frames} latent "
                    f"frames; want at least {-(-clip.frames // grid.frames)}, or null"
                )
            if clip.frames == 1 and self.frames is None:
                raise ConfigError("frames=1: an image has no frames to complete; want clips")
            if clip.frames == 1:  # images after clips: nothing is known
                return self
            places(self.known, clip.frames)
            return replace(self.agree(frames=clip.frames), mask_channels=channels)

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {"frames": draws.uniform("drop_frames") < self.cfg.drop_frames}

    def forward(
        self, batch: Batch, grid: Clip, drop: dict[str, Tensor], draws: Draws, encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:  # fmt: skip
        """Draws the known frames in training; in sampling they are `known`.

        Unknown pixels are mid-grey before they are encoded, so that no first stage passes on what
        it sees of them. Draws the first stage's "known_posterior". Raises ValueError for a batch
        without frames, or with another number of images than known frames.
        """
        video = self.pixels(batch)  # (B, 3, N, H, W)
        count, frames = len(video), video.shape[2]
        if z0 is None:
            known = torch.zeros(count, frames, dtype=torch.bool)
            if frames > 1:
                known[:, list(places(self.cfg.known, frames))] = True
        else:
            known = self.draw(draws, count, frames)
        known = known.to(video.device)
        if (dropped := drop.get("frames")) is not None:
            known = known & ~dropped.to(video.device)[:, None]
        z = encode(video * known[:, None, :, None, None], "known_posterior")  # (B, C, T', H, W)
        z = torch.cat([z[:, :, :1].expand(-1, -1, grid.frames - z.shape[2], -1, -1), z], 2)
        mask = packed(known, grid.frames, self.cfg.mask_channels or 1).to(z)  # (B, R, T)
        mask = mask[..., None, None].expand(-1, -1, -1, *z.shape[3:])
        return Conditions(concat=torch.cat([z, mask], 1))  # (B, C + R, T, H, W)

    def pixels(self, batch: Batch) -> Tensor:
        """(B, 3, N, H, W): the video of the batch, or its images at the places of known frames."""
        if batch.image is None:
            if batch.video is None:
                raise ValueError("conditioning=inpaint_frames needs frames, and the batch has none")
            return batch.video
        if self.cfg.frames is None:
            raise ValueError("conditioning.frames=null: want a number, or let wiring fill it")
        at = places(self.cfg.known, self.cfg.frames)
        if batch.image.shape[2] != len(at):
            raise ValueError(
                f"conditioning.known={list(self.cfg.known)}: the batch has {batch.image.shape[2]} "
                "images for a clip"
            )
        count, channels, _, height, width = batch.image.shape
        video = batch.image.new_zeros(count, channels, self.cfg.frames, height, width)
        video[:, :, list(at)] = batch.image
        return video

    def draw(self, draws: Draws, count: int, frames: int) -> Tensor:
        """(B, N) bool: which frames of each clip are known; at least one is not."""
        most = min(self.cfg.max_known or frames, frames - 1)
        place = torch.arange(frames)
        u, share = (draws.uniform(f"known_{name}").cpu()[:, None] for name in ("kind", "share"))
        at_end = 1 + (share * most).long()  # (B, 1), 1 to most
        at_both = 1 + (share * min(most, (frames - 1) // 2)).long()
        noise = draws.normal("known_frames", torch.empty(count, frames))
        kinds = {
            "prediction": place < at_end,
            "interpolation": (place < at_both) | (place >= frames - at_both),
            "backward": place >= frames - at_end,
            "scattered": torch.special.ndtr(noise) < share,
        }
        ends = torch.tensor(self.cfg.weights(), dtype=torch.float64).cumsum(0)
        kind = (u.double() * ends[-1] >= ends).sum(1, keepdim=True)  # (B, 1)
        known = torch.stack([kinds[name].expand(count, frames) for name in KINDS], 1)
        known = known.take_along_dim(kind[:, :, None], 1)[:, 0]
        unknown = torch.nn.functional.one_hot(noise.argmax(1), frames).bool()
        return known & ~(known.all(1, keepdim=True) & unknown)


def packed(known: Tensor, frames: int, channels: int) -> Tensor:
    """(B, N) bool of pixel frames -> (B, R, T): the R frames of each of T latent frames.

    The first latent frame repeats the first frame where there are fewer than R T frames.
    """
    first = known[:, :1].expand(-1, frames * channels - known.shape[1])
    return torch.cat([first, known], 1).unflatten(1, (frames, channels)).transpose(1, 2)
