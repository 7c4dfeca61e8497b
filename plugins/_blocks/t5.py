"""The encoder of T5 v1.1 (Raffel et al. 2020, 1910.10683; v1.1: gated GELU), published names.

In plain torch, so that encoders of any size can be built, checked and loaded without
`transformers`, which is needed for tokenisation only (`tokenizer`).
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins._blocks.state_dicts import check_values, differences, read_file
from plugins._blocks.text import row, words_of
from sandbox.contracts import StorageError

PAD, END = 0, 1  # token ids of every T5
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]  # captions -> ids (B, L), mask (B, L) bool


class Sizes(Protocol):
    """Settings of a T5 config.json under their names."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float


class RMSNorm(nn.Module):
    """x divided by its root mean square, in float32, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(self.weight.dtype)


class Attention(nn.Module):
    """Self-attention with unscaled scores; the first layer holds the relative position bias."""

    def __init__(self, sizes: Sizes, has_bias: bool) -> None:
        super().__init__()
        inner = sizes.num_heads * sizes.d_kv
        self.num_heads, self.max_distance = sizes.num_heads, sizes.relative_attention_max_distance
        self.q, self.k, self.v = (nn.Linear(sizes.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, sizes.d_model, bias=False)
        if has_bias:
            buckets = sizes.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(buckets, sizes.num_heads)

    def bias(self, length: int) -> Tensor:
        """(1, heads, L, L) for all pairs of tokens."""
        table = self.relative_attention_bias
        index = torch.arange(length, device=table.weight.device)
        distance = index[None] - index[:, None]
        rows = buckets(distance, table.num_embeddings, self.max_distance)
        return table(rows).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            to(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for to in (self.q, self.k, self.v)
        )  # (B, H, L, d_kv)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(out.transpose(1, 2).flatten(2))


def buckets(distance: Tensor, number: int, max_distance: int) -> Tensor:
    """Bucket of each distance: half per direction; exact if small, logarithmic if large."""
    half = number // 2
    exact = half // 2
    near = distance.abs()
    far = (near.clamp_min(1).float() / exact).log() / math.log(max_distance / exact)
    far = exact + (far * (half - exact)).long()
    return torch.where(near < exact, near, far.clamp_max(half - 1)) + half * (distance > 0)


class GatedMLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(sizes.d_model, sizes.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(sizes.d_ff, sizes.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        return self.wo(hidden.to(self.wo.weight.dtype))  # float32 in a float16 model: `to_dtype`


class AttentionLayer(nn.Module):
    """Norm, attention and a residual."""

    def __init__(self, sizes: Sizes, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(sizes, has_bias)
        self.layer_norm = RMSNorm(sizes.d_model, sizes.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class MLPLayer(nn.Module):
    """Norm, MLP and a residual."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.DenseReluDense = GatedMLP(sizes)
        self.layer_norm = RMSNorm(sizes.d_model, sizes.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, sizes: Sizes, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(sizes, has_bias), MLPLayer(sizes)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        return mlp(attention(x, bias))


class Stack(nn.Module):
    def __init__(self, sizes: Sizes, shared: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = shared
        self.block = nn.ModuleList(Block(sizes, i == 0) for i in range(sizes.num_layers))
        self.final_layer_norm = RMSNorm(sizes.d_model, sizes.layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        x = self.embed_tokens(ids)
        first = next(m for m in self.modules() if isinstance(m, Attention))
        bias = first.bias(ids.shape[1])  # (1, H, L, L), shared by all blocks
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """Token ids (B, L) -> (B, L, d_model). As published, the token embedding has two names."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.shared = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.encoder = Stack(sizes, self.shared)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, L) is True for real tokens; None: attention includes the padding."""
        return self.encoder(ids, mask)

    def to_dtype(self, dtype: torch.dtype) -> "T5Encoder":
        """Casts the weights; in float16, output layers of MLPs stay in float32 (they overflow)."""
        self.to(dtype)
        if dtype == torch.float16:
            for module in self.modules():
                if isinstance(module, GatedMLP):
                    module.wo.float()
        return self

    def load(self, folder: Path) -> None:
        """Loads released weights (model*.safetensors) to the CPU; on the meta device only checks.

        Raises StorageError for missing files and for names or shapes that differ.
        """
        given, own = dict(tensors(folder)), self.state_dict()
        state = dict(given)
        names = "shared.weight", "encoder.embed_tokens.weight"
        for name, other in (names, names[::-1]):  # files contain one of the two names, or both
            if name not in state and other in state:
                state[name] = state[other]
        if found := differences(own, state):
            raise StorageError(
                f"conditioning.weights={folder}: {found.count} names or shapes differ from this "
                f"configuration; set the sizes of these weights{found.lines}"
            )
        check_values(f"conditioning.weights={folder}", given, own)
        if torch.get_default_device().type == "meta":
            return
        types = {name: x.dtype for name, x in own.items()}
        self.load_state_dict({k: v.to(types[k]) for k, v in state.items()}, assign=True)
        self.encoder.embed_tokens = self.shared


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a model saved in one or more safetensors files."""
    index = next(folder.glob("model*.safetensors.index.json"), None)
    if index:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(p.name for p in folder.glob("model*.safetensors"))
    if not files:
        raise StorageError(f"conditioning.weights={folder}: no model*.safetensors; convert the "
                           "weights to that format if you trust them")  # fmt: skip
    for name in files:
        if not (folder / name).is_file():
            raise StorageError(f"{folder / name}: no such file, but the index lists it")
        yield from read_file(folder / name, "conditioning.weights").items()


# --- tokens ---------------------------------------------------------------------------------------


def tokenizer(folder: Path, length: int) -> Tokenize:
    """The released tokenizer in `folder`, with truncation and padding to `length`."""
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise RuntimeError(
            "conditioning.weights needs transformers and sentencepiece for tokens: install the "
            "extra `text` (uv sync --extra text, or pip install -e '.[text]')"
        ) from e
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(captions: list[str]) -> tuple[Tensor, Tensor]:
        batch = tokens(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return batch.input_ids, batch.attention_mask.bool()

    return tokenize


def hashed_words(vocab_size: int, length: int) -> Tokenize:
    """Hashes words to ids and appends the end token; for encoders that are trained here."""

    def tokenize(captions: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(captions), length), PAD)
        for out, caption in zip(ids, captions, strict=True):
            words = [END + row(word, vocab_size - 2) for word in words_of(caption)[: length - 1]]
            out[: len(words) + 1] = torch.tensor([*words, END])
        return ids, ids != PAD

    return tokenize
