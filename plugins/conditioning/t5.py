"""Captions through a T5 encoder, and where asked the first frame's latents beside the noisy ones.

Text as in CogVideoX (226 tokens, padding is seen) or EasyAnimateV2 (120, masked); image-to-video as
in CogVideoX (Yang et al. 2024, 2408.06072, section 3.4; noise augmentation as published in code).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plugins._blocks.t5 import T5Encoder, hashed_words, tokenizer
from sandbox.contracts import (
    SIZES,
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = ("fp32", "bf16", "fp16")
IMAGES = ("none", "first_frame")


@register("conditioning", "t5")
class T5(nn.Module):
    """T5 text tokens; optionally the first frame's latents as channels (image to video)."""

    @dataclass
    class Config(ConditioningConfig):
        """Text, its encoder under the names of a T5 config.json, and the image.

        weights: null trains a small encoder of hashed words along; a folder or a name on the hub
        (a T5, or a whole system with text_encoder/ and tokenizer/) is frozen, in `dtype`; "cached"
        builds none, and batches bring embeddings. length: tokens of every caption; masked: padding
        is seen by nobody (as published for EasyAnimate), or like text (CogVideoX). drop_text:
        probability that training drops a caption.

        image: first_frame joins its latents to those of the first latent frame, zeros to others.
        While training, image noise of deviation exp(N(image_noise_mean, image_noise_std)) is added
        to its pixels (null: none), of one level for the micro-batch or (image_noise_shared=false)
        one for each clip, and drop_image is the probability of zeros in its place; guidance never
        drops it. image_latent_scale: multiplies its scaled latents, in training and sampling alike.
        ofs: a number that the network is told (2.0 in CogVideoX-1.5 image to video). sizes: the
        network is told height, width and aspect_ratio of the clip, in pixels (EasyAnimate with
        sample_size=128).
        """

        may_differ: ClassVar[tuple[str, ...]] = (
            "weights",
            "dtype",
            "drop_text",
            "image_noise_mean",
            "image_noise_std",
            "image_noise_shared",
            "drop_image",
            "ofs",
        )

        weights: str | None = None
        dtype: str = "fp32"
        length: int = 8
        masked: bool = False
        drop_text: float = 0.1
        vocab_size: int = 1024
        d_model: int = 64
        d_kv: int = 16
        d_ff: int = 128
        num_layers: int = 1
        num_heads: int = 4
        relative_attention_num_buckets: int = 32
        relative_attention_max_distance: int = 128
        layer_norm_epsilon: float = 1e-6
        image: str = "none"
        image_noise_mean: float | None = -3.0
        image_noise_std: float = 0.5
        image_noise_shared: bool = True
        drop_image: float = 0.0
        image_latent_scale: float = 1.0
        ofs: float | None = None
        sizes: bool = False

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for name in ("length", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
                yield from in_range(name, getattr(self, name), 1)
            yield from in_range("vocab_size", self.vocab_size, 3)
            yield from one_of("dtype", self.dtype, DTYPE_NAMES)
            yield from one_of("image", self.image, IMAGES)
            for name in ("drop_text", "drop_image"):
                yield from in_range(name, getattr(self, name), 0, 1)
            yield from above("layer_norm_epsilon", self.layer_norm_epsilon, 0)
            yield from above("image_latent_scale", self.image_latent_scale, 0)
            yield from in_range("image_noise_mean", self.image_noise_mean, -20, 5)
            yield from in_range("image_noise_std", self.image_noise_std, 0, 10)
            yield from in_range("ofs", self.ofs, 0, 1e6)
            buckets = self.relative_attention_num_buckets
            yield from in_range("relative_attention_num_buckets", buckets, 4)
            if not self.relative_attention_max_distance > buckets // 4:
                yield (
                    f"relative_attention_max_distance={self.relative_attention_max_distance}: want "
                    f"more than {buckets // 4}, the distances with a bucket of their own"
                )
            if self.weights == "cached" and self.drop_text > 0:
                yield (
                    f"drop_text={self.drop_text}: weights='cached' has no encoder for an empty "
                    "caption; want 0"
                )
            if self.weights is None and self.dtype != "fp32":
                yield f"dtype={self.dtype!r}: a network that is trained wants 'fp32'"

        def needs(self) -> frozenset[str]:
            text = "text" if self.weights == "cached" else "captions"
            return frozenset({text, *(SIZES if self.sizes else ())})

        def encodes(self) -> bool:
            return self.image != "none"

        def embeds(self) -> bool:
            return self.weights not in (None, "cached")

        def signals(self) -> tuple[str, ...]:
            return ("text",)

        def images(self) -> tuple[str, ...]:
            return ("start",) if self.image != "none" else ()

        def files(self) -> dict[str, str | None]:
            is_here = self.weights not in (None, "cached") and is_path(self.weights)
            return {"weights": self.weights} if is_here else {}

        def diffusers_config(self) -> dict[str, Any]:
            return {"_class_name": "T5EncoderModel"}

        def offers(self, clip: Clip, grid: Clip) -> Slots:
            return Slots(
                context=Tokens(self.d_model, self.length, self.masked),
                concat=grid.channels if self.image != "none" else 0,
                scalars=frozenset(
                    (*(() if self.ofs is None else ("ofs",)), *(SIZES if self.sizes else ()))
                ),
            )

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder: T5Encoder | None = None
        self.tokenize = hashed_words(cfg.vocab_size, cfg.length)
        if cfg.weights is None:
            self.encoder = T5Encoder(cfg)
        elif cfg.weights != "cached":
            self.load()

    def load(self) -> None:
        """Released weights and tokens. Raises ConfigError or StorageError where there are none."""
        is_meta = torch.get_default_device().type == "meta"
        with torch.device("meta"):
            self.encoder = T5Encoder(self.cfg).to_dtype(DTYPES[self.cfg.dtype])
        # Frozen for the system, too: never in training mode, not in training checkpoints.
        self.encoder._frozen = True  # type: ignore[assignment]
        if not is_meta:
            folder = found(self.cfg.weights or "")
            self.tokenize = tokenizer(inside(folder, "tokenizer"), self.cfg.length)
            self.encoder.load(inside(folder, "text_encoder"))
        self.encoder.requires_grad_(False).eval()

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {"text": draws.uniform("drop_text") < self.cfg.drop_text}

    def forward(
        self,
        batch: Batch,
        grid: Clip,
        drop: dict[str, Tensor],
        draws: Draws,
        encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:
        """Dropped captions are replaced by the batch's negative ones, or else by empty ones."""
        context, mask = self.text(batch, drop.get("text"))
        cond = Conditions(context=context, context_mask=mask if self.cfg.masked else None)
        if self.cfg.image != "none":
            pixels = batch.image if batch.image is not None else batch.video
            if pixels is None:
                raise ValueError("conditioning=t5 needs an image, and the batch has none")
            cond.concat = self.image(pixels[:, :, :1], grid, draws, encode, z0 is not None)
        if self.cfg.ofs is not None:
            cond.scalars["ofs"] = context.new_full((len(context),), self.cfg.ofs)
        if self.cfg.sizes:
            cond.scalars |= {name: batch.scalars[name] for name in SIZES}
        return cond

    # text

    def text(self, batch: Batch, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32, and (B, L) True for real tokens."""
        if batch.text is not None:
            whole = batch.text.float(), batch.text_mask
            if whole[1] is None:
                whole = whole[0], whole[0].new_ones(whole[0].shape[:2], dtype=torch.bool)
            if drop is None or not drop.any():
                return whole  # type: ignore[return-value]
            instead = self.instead(batch, len(whole[0]))
            chosen = drop.to(whole[0].device)[:, None]
            kept = torch.where(chosen[..., None], instead[0], whole[0])
            return kept, torch.where(chosen, instead[1], whole[1])  # type: ignore[arg-type]
        if batch.captions is None:
            raise ValueError("conditioning=t5 needs captions, and the batch has none")
        captions = batch.captions
        if drop is not None:
            negative = batch.negative or [""] * len(captions)
            rows = zip(drop.tolist(), negative, captions, strict=True)
            captions = [instead if is_dropped else own for is_dropped, instead, own in rows]
        return self.encoded(captions)

    def instead(self, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
        """What stands for dropped captions beside embeddings that the batch brings."""
        if batch.negative is None and batch.no_text is not None and batch.no_text_mask is not None:
            return batch.no_text.float(), batch.no_text_mask
        return self.encoded(batch.negative or [""] * number)

    def encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32, and (B, L) True for real tokens."""
        if self.encoder is None:
            raise ValueError(
                "conditioning.weights='cached' has no text encoder, and the batch brings captions "
                "without embeddings; name a folder with a T5"
            )
        device = self.encoder.shared.weight.device
        ids, mask = (x.to(device) for x in self.tokenize(captions))
        seen = mask if self.cfg.masked else None
        if self.cfg.weights is None:
            return self.encoder(ids, seen).float(), mask
        # In its own dtype, and one by one: the last bits depend on no other caption of the batch.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = [
                self.encoder(ids[i : i + 1], None if seen is None else seen[i : i + 1])
                for i in range(len(ids))
            ]
            return torch.cat(found).float(), mask

    # image

    def image(
        self, pixels: Tensor, grid: Clip, draws: Draws, encode: Encode, is_training: bool
    ) -> Tensor:
        """Latents of `pixels` (B, 3, 1, H, W), then zeros: (B, C, T, H, W) as large as `grid`.

        Draws: "image_noise_level", "image_noise" and "drop_image" while training, and the first
        stage's "image_posterior".
        """
        if is_training and self.cfg.image_noise_mean is not None:
            pixels = pixels + self.noise(pixels, draws)
        first = encode(pixels, "image_posterior")[:, :, :1] * self.cfg.image_latent_scale
        if is_training and self.cfg.drop_image:
            kept = draws.uniform("drop_image") >= self.cfg.drop_image
            first = first * kept.to(first).view(-1, 1, 1, 1, 1)
        others = first.new_zeros(*first.shape[:2], grid.frames - 1, *first.shape[3:])
        return torch.cat((first, others), 2)

    def noise(self, pixels: Tensor, draws: Draws) -> Tensor:
        levels = draws.shared() if self.cfg.image_noise_shared else draws
        level = levels.normal("image_noise_level", pixels[:, :1, :1, :1, :1])
        sigma = (self.cfg.image_noise_mean + self.cfg.image_noise_std * level).exp()
        return sigma * draws.normal("image_noise", pixels)


def found(weights: str) -> Path:
    """The folder of released weights, fetched from the hub where there is none of that name."""
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    wanted, others = ["*.json", "*.model", "*.safetensors"], ["transformer/*", "vae/*"]
    try:
        return Path(snapshot_download(weights, allow_patterns=wanted, ignore_patterns=others))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"conditioning.weights={weights}: no such folder, and the hub does not give it: {e}"
        ) from e


def inside(folder: Path, part: str) -> Path:
    """The part of a whole system's folder, or the folder itself."""
    return folder / part if (folder / part).is_dir() else folder
