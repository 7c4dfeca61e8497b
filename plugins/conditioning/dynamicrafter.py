"""What DynamiCrafter is told (Xing et al. 2023, 2310.12190): text, an image three ways, a rate.

One frame of the clip goes in as tokens that a query transformer makes of CLIP's (a set for every
frame), and as latents joined to the noisy ones; captions as OpenCLIP text tokens. Module names are
the published ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from plugins._blocks import openclip
from plugins._blocks.resampler import Resampler
from sandbox.contracts import (
    Batch,
    Clip,
    ConditioningConfig,
    Conditions,
    ConfigError,
    Draws,
    Encode,
    Slots,
    Tokens,
    above,
    in_range,
    is_path,
    one_of,
)
from sandbox.registry import register

TOKENS = 77  # of every caption, as published
RATES = ("none", "fps", "frame_stride")


@register("conditioning", "dynamicrafter")
class DynamiCrafter(nn.Module):
    """DynamiCrafter's text and image tokens, image latents and frame rate, dropped jointly."""

    @dataclass
    class Config(ConditioningConfig):
        """Both CLIP towers (frozen), the query transformer (trained), and what is dropped.

        weights: of CLIP: a file (a CLIP, or a published system), a name on the hub, or "random".
        text_ and vision_: open_clip's text_cfg and vision_cfg. The published names of the query
        transformer follow; video_length null is the clip's frames, 0 one set of tokens for all
        frames, and any other number must be that of the frames: the original goes on with 256
        tokens for each frame where a clip does not have 16.

        uncond_prob p: a uniform number below 2p drops the text, one in [p, 3p) the image's tokens;
        its latents stay. rand_cond_frame: the frame that is shown is drawn, one for the
        micro-batch, else the first. interp_mode: latents of the first and the last frame, zeros
        between. fps_condition_type: the number that the network is told, in whole units.
        """

        may_differ: ClassVar[tuple[str, ...]] = (
            "weights",
            "uncond_prob",
            "rand_cond_frame",
            "video_length",
        )

        weights: str = "random"
        text_width: int = 32
        text_heads: int = 2
        text_layers: int = 2
        vision_width: int = 32
        vision_layers: int = 1
        vision_head_width: int = 16
        patch_size: int = 14
        image_size: int = 28
        mlp_ratio: float = 4.0
        embed_dim: int = 16
        dim: int = 32
        depth: int = 1
        dim_head: int = 16
        heads: int = 2
        num_queries: int = 4
        ff_mult: int = 2
        video_length: int | None = None
        uncond_prob: float = 0.05
        rand_cond_frame: bool = True
        interp_mode: bool = False
        fps_condition_type: str = "none"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("text_width", "text_heads", "vision_width", "vision_layers", "depth",
                         "vision_head_width", "patch_size", "embed_dim", "dim", "dim_head", "heads",
                         "num_queries", "ff_mult"):  # fmt: skip
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("text_layers", self.text_layers, 2)
            yield from in_range("video_length", self.video_length, 0)
            yield from above("mlp_ratio", self.mlp_ratio, 0, 16)
            yield from in_range("uncond_prob", self.uncond_prob, 0, 1 / 3)
            yield from one_of("fps_condition_type", self.fps_condition_type, RATES)
            for name, by in (("text_width", "text_heads"), ("vision_width", "vision_head_width")):
                n = getattr(self, by)
                if n > 0 and getattr(self, name) % n:
                    yield f"{by}={n}: want a divisor of {name}={getattr(self, name)}"
            if self.image_size < 1 or (self.patch_size > 0 and self.image_size % self.patch_size):
                yield f"image_size={self.image_size}: want a multiple of {self.patch_size}"

        def needs(self) -> frozenset[str]:
            rate = {self.fps_condition_type} - {"none"}
            return frozenset({"captions", "video"} | rate)

        def encodes(self) -> bool:
            """Its CLIP looks at pixels, so that cached latents alone are not enough."""
            return True

        def signals(self) -> tuple[str, ...]:
            return ("text", "image")

        def images(self) -> tuple[str, ...]:
            return ("start", "end") if self.interp_mode else ("start",)

        def files(self) -> dict[str, str | None]:
            is_here = self.weights != "random" and is_path(self.weights)
            return {"weights": self.weights} if is_here else {}

        def offers(self, clip: Clip, grid: Clip) -> Slots:
            if grid.frames != clip.frames:
                raise ConfigError(
                    f"dynamicrafter: shows the latents of one frame, but {clip.frames} frames "
                    f"become {grid.frames} latents; want a first stage that keeps frames apart"
                )
            each = 1 if self.video_length == 0 else grid.frames
            return Slots(
                context=Tokens(self.text_width, TOKENS),
                image_context=Tokens(self.text_width, self.num_queries, frames=each),
                concat=grid.channels,
                scalars=frozenset({self.fps_condition_type} - {"none"}),
            )

        def wired(self, clip: Clip, grid: Clip) -> Self:
            return self if self.video_length == 0 else self.agree(video_length=grid.frames)

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.video_length is None:
            raise ValueError("conditioning.video_length is null: wiring fills it, or set a number")
        self.cond_stage_model, self.embedder = towers(cfg)
        self.image_proj_model = Resampler(
            cfg.dim, cfg.depth, cfg.dim_head, cfg.heads, cfg.num_queries, cfg.vision_width,
            cfg.text_width, cfg.ff_mult, cfg.video_length or None,
        )  # fmt: skip

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        """One number for both: [0, p) text alone, [p, 2p) both, [2p, 3p) image alone."""
        r, p = draws.uniform("drop"), self.cfg.uncond_prob
        return {"text": r < 2 * p, "image": (r >= p) & (r < 3 * p)}

    def forward(
        self,
        batch: Batch,
        grid: Clip,
        drop: dict[str, Tensor],
        draws: Draws,
        encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:
        """The image is that of the batch (two of them: first and last), else a frame of the video.

        Draws "condition_frame" while training, and the first stage's "image_posterior" where an
        image comes with the batch or there are no latents of the clip. Raises ValueError where the
        batch has neither image nor video, and for frames that the tokens are not for.
        """
        if batch.captions is None:
            raise ValueError("conditioning=dynamicrafter needs captions, and the batch has none")
        if (made_for := self.cfg.video_length) not in (0, grid.frames):
            raise ValueError(f"conditioning.video_length={made_for}: the clip has {grid.frames}")
        captions = openclip.replaced(batch.captions, drop.get("text"), batch.negative)
        place = self.place(draws, grid, z0)
        image = self.image(batch, place)
        return Conditions(
            context=self.text(captions),
            image_context=self.tokens(image, drop.get("image")),
            concat=self.concat(image, place, batch, grid, draws, encode, z0),
            scalars=self.rate(batch),
        )

    # text

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """(B, 77, D)."""
        device = self.image_proj_model.latents.device
        return self.cond_stage_model(openclip.tokenizer()(captions).to(device))

    # image

    def place(self, draws: Draws, grid: Clip, z0: Tensor | None) -> int:
        """The frame that is shown: one for the micro-batch, drawn while training."""
        if z0 is None or not self.cfg.rand_cond_frame:
            return 0
        return int(draws.shared().integers("condition_frame", 0, grid.frames)[0])

    def image(self, batch: Batch, place: int) -> Tensor:
        """(B, 3, 1 or 2, H, W): the shown frame, with interp_mode the first and the last."""
        pixels = batch.image if batch.image is not None else batch.video
        if pixels is None:
            raise ValueError("conditioning=dynamicrafter needs an image, and the batch has none")
        if batch.image is None and not self.cfg.interp_mode:
            return pixels[:, :, place : place + 1]
        last = pixels.shape[2] - 1
        return pixels[:, :, [0, last] if self.cfg.interp_mode else [0]]

    def tokens(self, image: Tensor, drop: Tensor | None) -> Tensor:
        """(B, T or 1, N, D) of the first image; dropped ones are mid grey."""
        first = image[:, :, 0]
        if drop is not None:
            first = first * (~drop).to(first).view(-1, 1, 1, 1)
        with torch.no_grad():
            features = self.embedder(first)
        frames = self.cfg.video_length or 1
        return self.image_proj_model(features).unflatten(1, (frames, -1))

    def concat(
        self,
        image: Tensor,
        place: int,
        batch: Batch,
        grid: Clip,
        draws: Draws,
        encode: Encode,
        z0: Tensor | None,
    ) -> Tensor:
        """(B, C, T, H, W): latents of the shown frame in all frames, or of the two ends."""
        if z0 is not None and batch.image is None:
            shown = z0[:, :, [0, -1]] if self.cfg.interp_mode else z0[:, :, place : place + 1]
        else:
            shown = encode(image, "image_posterior")
        if not self.cfg.interp_mode:
            return shown.expand(-1, -1, grid.frames, -1, -1)
        size = grid.channels, grid.frames, grid.height, grid.width
        between = shown.new_zeros(len(shown), *size)
        between[:, :, 0], between[:, :, -1] = shown[:, :, 0], shown[:, :, -1]
        return between

    def rate(self, batch: Batch) -> dict[str, Tensor]:
        name = self.cfg.fps_condition_type
        if name not in batch.scalars:  # none, or a prompt without: the network's own default
            return {}
        return {name: batch.scalars[name].long().float()}  # as published: whole numbers


def towers(cfg: DynamiCrafter.Config) -> tuple[nn.Module, nn.Module]:
    """The text and the image tower, frozen."""
    openclip.look(cfg.weights)
    text = openclip.TextModel(cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.embed_dim)
    visual = openclip.Vision(
        cfg.vision_width, cfg.vision_layers, cfg.vision_head_width, cfg.patch_size,
        cfg.image_size, cfg.embed_dim, cfg.mlp_ratio,
    )  # fmt: skip
    image = openclip.ImageModel(visual, cfg.text_width, cfg.embed_dim)
    openclip.load(text, cfg.weights, "cond_stage_model.model.")
    openclip.load(image, cfg.weights, "embedder.model.")
    return (
        openclip.frozen(openclip.TextEncoder(text, skip=1)),
        openclip.frozen(openclip.ImageEncoder(image)),
    )
