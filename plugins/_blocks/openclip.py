"""Frozen text and image encoders of OpenCLIP, with open_clip's parameter names but our own code.

Radford et al. 2021 (2103.00020) in the form of Cherti et al. 2022 (2212.07143). The published
latent video models call open_clip's own blocks, whose axis order changed in version 2.26; these
encoders use (B, L, D) throughout. Only the tokenizer is open_clip's.
"""

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks.fetching import from_hub
from plugins._blocks.state_dicts import (
    check_values,
    differences,
    is_checking_weight_files,
    plain_names,
    read_file,
)
from sandbox.contracts import StorageError

VOCABULARY = 49408  # of open_clip's tokenizer
CONTEXT_LENGTH = 77
RANDOM = "random"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Attention(nn.Module):
    """Self-attention with the parameter names of torch's MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (h.transpose(1, 2) for h in qkv.unflatten(-1, (3, self.heads, -1)).unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, H, L, d)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(layers))


class TextParts(nn.Module):
    """Parameters of the text model outside its blocks, which both encoders keep as published."""

    def __init__(self, width: int, embed_dim: int, vocab_size: int, context_length: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)


class TextModel(TextParts):
    """CLIP without its image encoder."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        vocab_size: int = VOCABULARY,
        context_length: int = CONTEXT_LENGTH,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__(width, embed_dim, vocab_size, context_length)
        self.transformer = Transformer(width, layers, heads, mlp_ratio)


class TextEncoder(nn.Module):
    """Token ids (B, L) -> features of all tokens (B, L, width), after the final norm.

    skip: number of last blocks that are not applied; 1 is the published layer "penultimate", 0 is
    "last". As published, skipped blocks and the projection stay in the state dict.
    """

    def __init__(self, model: TextModel, skip: int) -> None:
        super().__init__()
        self.model, self.skip = model, skip

    def forward(self, ids: Tensor) -> Tensor:
        m = self.model
        x = m.token_embedding(ids) + m.positional_embedding[: ids.shape[1]]
        blocks = list(m.transformer.resblocks)
        for block in blocks[: len(blocks) - self.skip]:
            x = block(x, causal=True)
        return m.ln_final(x)


class Vision(nn.Module):
    """Images (B, 3, S, S), normalised for CLIP -> tokens (B, 1 + (S / patch)^2, width).

    All tokens of the last block. As published, `ln_post` and `proj` are in the state dict but are
    not applied.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        head_width: int,
        patch_size: int,
        image_size: int,
        embed_dim: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        tokens = 1 + (image_size // patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, width // head_width, mlp_ratio)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N, D)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, x], 1) + self.positional_embedding)
        for block in self.transformer.resblocks:
            x = block(x)
        return x


class ImageModel(TextParts):
    """CLIP without its text blocks; as published, the rest of the text model stays."""

    def __init__(
        self,
        visual: Vision,
        text_width: int,
        embed_dim: int,
        vocab_size: int = VOCABULARY,
        context_length: int = CONTEXT_LENGTH,
    ) -> None:
        super().__init__(text_width, embed_dim, vocab_size, context_length)
        self.visual = visual


class ImageEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] of any size -> tokens (B, N, width)."""

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.visual(normalise(resize(x, self.model.visual.image_size)))


# --- images ---------------------------------------------------------------------------------------


def resize(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), bicubic with align_corners; ignores the aspect ratio.

    As published (kornia 0.6): if either side shrinks, both are first blurred with
    sigma = (factor - 1) / 2. Values are not clamped.
    """
    factors = [side / size for side in x.shape[-2:]]
    if max(factors) > 1:
        sigmas = [max((factor - 1) / 2, 0.001) for factor in factors]
        x = blur(x, [int(max(4 * sigma, 3)) | 1 for sigma in sigmas], sigmas)
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=True)


def blur(x: Tensor, lengths: list[int], sigmas: list[float]) -> Tensor:
    """Gaussian blur of (B, C, H, W) along both sides, with reflection padding."""
    b, c, h, w = x.shape
    x = x.reshape(b * c, 1, h, w)
    x = F.pad(x, [n // 2 for n in reversed(lengths) for _ in range(2)], mode="reflect")
    for shape, length, sigma in zip([(-1, 1), (1, -1)], lengths, sigmas, strict=True):
        offsets = torch.arange(length, dtype=x.dtype, device=x.device) - length // 2
        weights = (-offsets.square() / (2 * sigma**2)).exp()
        x = F.conv2d(x, (weights / weights.sum()).view(1, 1, *shape))
    return x.view(b, c, h, w)


def normalise(x: Tensor) -> Tensor:
    """Converts pixels in [-1, 1] to CLIP's input normalisation."""
    mean, std = (x.new_tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    return ((x + 1) / 2 - mean) / std


# --- text -----------------------------------------------------------------------------------------


@cache
def tokenizer() -> Callable[[list[str]], Tensor]:
    """Captions -> ids (B, 77): start token, byte pairs, end token, zeros; truncated if too long."""
    from open_clip.tokenizer import SimpleTokenizer

    return partial(SimpleTokenizer(), context_length=CONTEXT_LENGTH)


# --- weights --------------------------------------------------------------------------------------


def freeze(module: nn.Module) -> nn.Module:
    """Freezes `module`: eval mode always; checkpoints store its hash instead of its weights."""
    module._frozen = True  # type: ignore[assignment]  # attribute that checkpoints look for
    return module.requires_grad_(False).eval()


def load(
    model: nn.Module, weights: str, prefix: str, setting: str = "conditioning.weights"
) -> None:
    """Loads `weights` strictly into a TextModel or an ImageModel.

    weights: a file (of CLIP, or of a complete published system with the model under `prefix`), a
    repository on the hub, or "random" to keep the initial weights. Models on the meta device are
    left as they are, but a check before a run reads the file for them, too. Raises StorageError for
    `setting`.
    """
    is_meta = next(model.parameters()).is_meta
    is_file = Path(weights).expanduser().is_file()
    if weights == RANDOM or (is_meta and not (is_file and is_checking_weight_files())):
        return
    path, own = weights_file(weights, setting), model.state_dict()
    state = read(path, setting)
    if any(k.startswith(prefix) for k in state):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if found := differences(own, {k: state[k] for k in own if k in state} or state):
        raise StorageError(
            f"{setting}={weights}: {found.count} of its weights do not fit this OpenCLIP"
            f"{found.lines}"
        )
    state = {k: state[k] for k in own}
    check_values(f"{setting}={weights}", state, own)
    if not is_meta:
        model.load_state_dict(state)


def check_weights(weights: str) -> None:
    """Raises the StorageError of `load` for a missing file, before a model is built."""
    if weights != RANDOM and torch.get_default_device().type != "meta":
        weights_file(weights)


def weights_file(weights: str, setting: str = "conditioning.weights") -> Path:
    """The file of `weights`, downloaded from the hub if no file has this name."""
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.suffix or not HUB_NAME.fullmatch(weights):
        raise StorageError(
            f"{setting}={weights}: no such file; want a file, a repository on the hub such as "
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K (3.9 GB), or weights=random for a dry run"
        )
    try:
        return from_hub(weights, HUB_FILES)
    except (OSError, ValueError) as e:
        raise StorageError(
            f"{setting}={weights}: {' or '.join(HUB_FILES)} (3.9 GB for ViT-H-14) is not in the "
            f"cache and cannot be downloaded ({type(e).__name__}); download it elsewhere and set "
            f"{setting}=FILE, or use weights=random for a dry run"
        ) from e


def read(path: Path, setting: str = "conditioning.weights") -> dict[str, Tensor]:
    """Named tensors of a file, loaded without executing code. Raises StorageError."""
    return plain_names(read_file(path, setting, mapped=True))
