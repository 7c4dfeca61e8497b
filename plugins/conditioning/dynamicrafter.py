"""DynamiCrafter's conditions (Xing et al. 2023, 2310.12190): text, an image, and a frame rate.

Captions become OpenCLIP text tokens. One frame of the clip becomes image tokens (CLIP features
through a query transformer, one set per frame) and latents that are concatenated to the noisy
ones. Module names are the published ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from plugins._blocks import openclip
from plugins._blocks.resampler import Resampler
from plugins._blocks.text import captions_of
from plugins._configs.weights import local_weights
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
    one_of,
)
from sandbox.registry import register

TOKENS = 77  # per caption, as published
FPS_CONDITIONS = ("none", "fps", "frame_stride")


@register("conditioning", "dynamicrafter")
class DynamiCrafter(nn.Module):
    """DynamiCrafter's text and image tokens, image latents and frame rate, with joint dropout."""

    @dataclass
    class Config(ConditioningConfig):
        """Both CLIP towers (frozen), the query transformer (trained), and condition dropout.

        weights: CLIP's weights: a file (a CLIP checkpoint or a published system), a name on the
        hub, or "random". text_* and vision_*: open_clip's text_cfg and vision_cfg. dim to ff_mult:
        the query transformer, under its published names. video_length: null is the clip's number
        of frames, 0 is one set of tokens for all frames, any other value must equal the number of
        frames (the original uses 256 tokens per frame for clips that do not have 16 frames).

        uncond_prob: with p this value and u uniform in [0, 1), u < 2p drops the text and
        p <= u < 3p drops the image tokens; image latents are always kept. rand_cond_frame: draws
        the condition frame, one per micro-batch; false takes the first. interp_mode: latents of
        the first and the last frame, zeros between. fps_condition_type: the scalar condition,
        rounded down to an integer.
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
            yield from one_of("fps_condition_type", self.fps_condition_type, FPS_CONDITIONS)
            for name, by in (("text_width", "text_heads"), ("vision_width", "vision_head_width")):
                n = getattr(self, by)
                if n > 0 and getattr(self, name) % n:
                    yield f"{by}={n}: want a divisor of {name}={getattr(self, name)}"
            if self.image_size < 1 or (self.patch_size > 0 and self.image_size % self.patch_size):
                yield f"image_size={self.image_size}: want a multiple of {self.patch_size}"

        def needs(self) -> frozenset[str]:
            return frozenset({"captions", "video", self.fps_condition_type} - {"none"})

        def encodes(self) -> bool:
            """True: CLIP reads pixels, so cached latents alone are not enough."""
            return True

        def signals(self) -> tuple[str, ...]:
            return ("text", "image")

        def images(self) -> tuple[str, ...]:
            return ("start", "end") if self.interp_mode else ("start",)

        def files(self) -> dict[str, str | None]:
            return local_weights(self.weights, "random")

        def offers(self, clip: Clip, grid: Clip) -> Slots:
            if grid.frames != clip.frames:
                raise ConfigError(
                    f"conditioning=dynamicrafter: {clip.frames} frames become {grid.frames} latent "
                    "frames; want a first stage without temporal compression"
                )
            token_sets = 1 if self.video_length == 0 else grid.frames
            return Slots(
                context=Tokens(self.text_width, TOKENS),
                image_context=Tokens(self.text_width, self.num_queries, frames=token_sets),
                concat=grid.channels,
                scalars=frozenset({self.fps_condition_type} - {"none"}),
            )

        def wired(self, clip: Clip, grid: Clip) -> Self:
            return self if self.video_length == 0 else self.agree(video_length=grid.frames)

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        if cfg.video_length is None:
            raise ValueError("conditioning.video_length=null: want a number, or let wiring fill it")
        self.cond_stage_model, self.embedder = towers(cfg)
        self.image_proj_model = Resampler(
            cfg.dim, cfg.depth, cfg.dim_head, cfg.heads, cfg.num_queries, cfg.vision_width,
            cfg.text_width, cfg.ff_mult, cfg.video_length or None,
        )  # fmt: skip

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        """One draw u for both: u < p drops text, u < 2p text and image, u < 3p image."""
        r, p = draws.uniform("drop"), self.cfg.uncond_prob
        return {"text": r < 2 * p, "image": (r >= p) & (r < 3 * p)}

    def forward(
        self, batch: Batch, grid: Clip, drop: dict[str, Tensor], draws: Draws, encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:  # fmt: skip
        """Uses the batch's image (with interp_mode two: first and last), else a video frame.

        Draws "condition_frame" in training, and the first stage's "image_posterior" if the batch
        has an image or there are no latents of the clip. Raises ValueError if the batch has no
        captions, or neither image nor video, or another number of frames than `video_length`.
        """
        captions = captions_of(batch, drop.get("text"), "dynamicrafter")
        if (length := self.cfg.video_length) not in (0, grid.frames):
            raise ValueError(f"conditioning.video_length={length}: the clip has {grid.frames}")
        frame = self.condition_frame(draws, grid, z0)
        image = self.image(batch, frame)
        if z0 is None or batch.image is not None:
            latents = encode(image, "image_posterior")
        else:
            latents = z0[:, :, [0, -1] if self.cfg.interp_mode else [frame]]
        return Conditions(
            context=self.text(captions),
            image_context=self.tokens(image, drop.get("image")),
            concat=self.concat(latents, grid),
            scalars=self.frame_rate(batch),
        )

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """(B, 77, D)."""
        device = self.image_proj_model.latents.device
        return self.cond_stage_model(openclip.tokenizer()(captions).to(device))

    def condition_frame(self, draws: Draws, grid: Clip, z0: Tensor | None) -> int:
        """Index of the condition frame: one per micro-batch, drawn in training."""
        if z0 is None or not self.cfg.rand_cond_frame:
            return 0
        return int(draws.shared().integers("condition_frame", 0, grid.frames)[0])

    def image(self, batch: Batch, frame: int) -> Tensor:
        """(B, 3, 1 or 2, H, W): the condition frame; with interp_mode the first and the last."""
        pixels = batch.image if batch.image is not None else batch.video
        if pixels is None:
            raise ValueError("conditioning=dynamicrafter needs an image, and the batch has none")
        if batch.image is None and not self.cfg.interp_mode:
            return pixels[:, :, frame : frame + 1]
        last = pixels.shape[2] - 1
        return pixels[:, :, [0, last] if self.cfg.interp_mode else [0]]

    def tokens(self, image: Tensor, drop: Tensor | None) -> Tensor:
        """(B, T or 1, N, D) from the first image; dropped images become mid-grey."""
        first = image[:, :, 0]
        if drop is not None:
            first = first * (~drop).to(first).view(-1, 1, 1, 1)
        with torch.no_grad():
            features = self.embedder(first)
        frames = self.cfg.video_length or 1
        return self.image_proj_model(features).unflatten(1, (frames, -1))

    def concat(self, latents: Tensor, grid: Clip) -> Tensor:
        """(B, C, T, H, W): `latents` in every frame, or with interp_mode in the first and last."""
        if not self.cfg.interp_mode:
            return latents.expand(-1, -1, grid.frames, -1, -1)
        size = grid.channels, grid.frames, grid.height, grid.width
        ends = latents.new_zeros(len(latents), *size)
        ends[:, :, 0], ends[:, :, -1] = latents[:, :, 0], latents[:, :, -1]
        return ends

    def frame_rate(self, batch: Batch) -> dict[str, Tensor]:
        name = self.cfg.fps_condition_type
        if name not in batch.scalars:  # "none", or a prompt without it: the backbone's default
            return {}
        return {name: batch.scalars[name].long().float()}  # as published: integers


def towers(cfg: DynamiCrafter.Config) -> tuple[nn.Module, nn.Module]:
    """The frozen text and image towers."""
    openclip.check_weights(cfg.weights)
    text = openclip.TextModel(cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.embed_dim)
    visual = openclip.Vision(
        cfg.vision_width, cfg.vision_layers, cfg.vision_head_width, cfg.patch_size,
        cfg.image_size, cfg.embed_dim, cfg.mlp_ratio,
    )  # fmt: skip
    image = openclip.ImageModel(visual, cfg.text_width, cfg.embed_dim)
    openclip.load(text, cfg.weights, "cond_stage_model.model.")
    openclip.load(image, cfg.weights, "embedder.model.")
    return (
        openclip.freeze(openclip.TextEncoder(text, skip=1)),
        openclip.freeze(openclip.ImageEncoder(image)),
    )
