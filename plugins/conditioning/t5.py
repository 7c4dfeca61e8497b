"""Captions encoded by T5, and optionally the first frame's latents as extra channels.

Text follows CogVideoX (226 tokens, padding is attended to) or EasyAnimateV2 (120 tokens, masked).
Image-to-video follows CogVideoX (Yang et al. 2024, 2408.06072, section 3.4; the noise augmentation
follows the published code).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plugins._blocks.state_dicts import is_checking_weight_files
from plugins._blocks.t5 import T5Encoder, hashed_words, tokenizer
from plugins._blocks.text import captions_of
from plugins._configs.weights import local_weights
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
    one_of,
)
from sandbox.registry import register

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = ("fp32", "bf16", "fp16")
IMAGES = ("none", "first_frame")


@register("conditioning", "t5")
class T5(nn.Module):
    """T5 text tokens; optionally the first frame's latents as channels (image-to-video)."""

    @dataclass
    class Config(ConditioningConfig):
        """The text encoder (sizes use the names of a T5 config.json) and the image condition.

        weights: null trains a small encoder on hashed words with the system; a folder or a name on
        the hub (a T5, or a full system with text_encoder/ and tokenizer/) is frozen, in `dtype`;
        "cached" builds no encoder and takes embeddings from the batch. length: tokens per caption;
        masked: whether padding is masked (as published for EasyAnimate) or attended to like text
        (CogVideoX). drop_text: probability that training drops a caption.

        image: first_frame concatenates its latents to the first latent frame, and zeros to the
        others. In training, noise with standard deviation exp(N(image_noise_mean,
        image_noise_std)) is added to its pixels (null: none), with one level per micro-batch or
        (image_noise_shared=false) per clip; drop_image is the probability that zeros replace the
        latents. Guidance never drops the image. image_latent_scale: factor on the scaled image
        latents, in training and sampling. ofs: a constant scalar condition (2.0 in CogVideoX-1.5
        image-to-video). sizes: conditions the network on the clip's height, width and
        aspect_ratio, in pixels (EasyAnimate with sample_size=128).
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
                    f"more than {buckets // 4}, the number of distances with a bucket each"
                )
            if self.weights == "cached" and self.drop_text > 0:
                yield (
                    f"drop_text={self.drop_text}: weights='cached' has no encoder for an empty "
                    "caption; want 0"
                )
            if self.weights is None and self.dtype != "fp32":
                yield f"dtype={self.dtype!r}: want 'fp32' for a trained encoder (weights=null)"

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
            return local_weights(self.weights, "cached")

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
        """Loads released weights and tokenizer. Raises ConfigError or StorageError."""
        is_meta = torch.get_default_device().type == "meta"
        if is_meta and is_checking_weight_files() and Path(self.cfg.weights or "").is_dir():
            T5Encoder(self.cfg).load(subfolder(Path(self.cfg.weights or ""), "text_encoder"))
        with torch.device("meta"):
            self.encoder = T5Encoder(self.cfg).to_dtype(DTYPES[self.cfg.dtype])
        # The system keeps frozen modules in eval mode and out of training checkpoints.
        self.encoder._frozen = True  # type: ignore[assignment]
        if not is_meta:
            folder = weights_folder(self.cfg.weights or "")
            self.tokenize = tokenizer(subfolder(folder, "tokenizer"), self.cfg.length)
            self.encoder.load(subfolder(folder, "text_encoder"))
        self.encoder.requires_grad_(False).eval()

    def drop(self, draws: Draws) -> dict[str, Tensor]:
        return {"text": draws.uniform("drop_text") < self.cfg.drop_text}

    def forward(
        self, batch: Batch, grid: Clip, drop: dict[str, Tensor], draws: Draws, encode: Encode,
        z0: Tensor | None,
    ) -> Conditions:  # fmt: skip
        """Replaces dropped captions by the batch's negative prompts, or by empty ones."""
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

    def text(self, batch: Batch, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32, and (B, L) bool, True for real tokens."""
        if batch.text is None:
            return self.encoded(captions_of(batch, drop, "t5"))
        embeddings, mask = batch.text.float(), batch.text_mask
        if mask is None:
            mask = embeddings.new_ones(embeddings.shape[:2], dtype=torch.bool)
        if drop is None or not drop.any():
            return embeddings, mask
        other, other_mask = self.replacements(batch, len(embeddings))
        dropped = drop.to(embeddings.device)[:, None]
        kept = torch.where(dropped[..., None], other, embeddings)
        return kept, torch.where(dropped, other_mask, mask)

    def replacements(self, batch: Batch, size: int) -> tuple[Tensor, Tensor]:
        """Embeddings and mask that replace dropped captions of cached embeddings."""
        if batch.negative is None and batch.no_text is not None and batch.no_text_mask is not None:
            return batch.no_text.float(), batch.no_text_mask
        return self.encoded(batch.negative or [""] * size)

    def encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32, and (B, L) bool, True for real tokens."""
        if self.encoder is None:
            raise ValueError(
                "conditioning.weights='cached' has no text encoder, and the batch has captions "
                "without embeddings; set conditioning.weights to a folder with a T5"
            )
        device = self.encoder.shared.weight.device
        ids, mask = (x.to(device) for x in self.tokenize(captions))
        attended = mask if self.cfg.masked else None
        if self.cfg.weights is None:
            return self.encoder(ids, attended).float(), mask
        # One caption at a time in the encoder's dtype: results do not depend on the rest of the
        # batch, bit for bit.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            rows = [
                self.encoder(ids[i : i + 1], None if attended is None else attended[i : i + 1])
                for i in range(len(ids))
            ]
            return torch.cat(rows).float(), mask

    def image(
        self, pixels: Tensor, grid: Clip, draws: Draws, encode: Encode, is_training: bool
    ) -> Tensor:
        """Latents of `pixels` (B, 3, 1, H, W) followed by zeros: (B, C, T, H, W), sized as `grid`.

        Draws "image_noise_level", "image_noise" and "drop_image" in training, and always the first
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
        log_mean = self.cfg.image_noise_mean
        assert log_mean is not None  # null adds no noise
        levels = draws.shared() if self.cfg.image_noise_shared else draws
        level = levels.normal("image_noise_level", pixels[:, :1, :1, :1, :1])
        sigma = (log_mean + self.cfg.image_noise_std * level).exp()
        return sigma * draws.normal("image_noise", pixels)


def weights_folder(weights: str) -> Path:
    """The local folder of released weights, downloaded from the hub if there is none."""
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    wanted, others = ["*.json", "*.model", "*.safetensors"], ["transformer/*", "vae/*"]
    try:
        return Path(snapshot_download(weights, allow_patterns=wanted, ignore_patterns=others))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"conditioning.weights={weights}: no such folder, and it cannot be downloaded from the "
            f"hub: {e}; name a folder with a T5"
        ) from e


def subfolder(folder: Path, name: str) -> Path:
    """The subfolder `name` of a full system, or `folder` itself if it has none."""
    return folder / name if (folder / name).is_dir() else folder
