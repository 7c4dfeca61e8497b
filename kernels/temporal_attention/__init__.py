"""Self-attention over the frames of a video, separately at each spatial position."""

from __future__ import annotations

from torch import Tensor

from kernels._dispatch import load, run


def temporal_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    heads: int,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v over the T frames at each of S spatial positions.

    q, k and v are (B, T, S, H*D) or (B, T, S, H, D) with H = `heads`. They share shape and dtype
    and may have any strides, such as the slices of a packed (B, T, S, 3, H, D) tensor. If the
    packed tensor is passed alone as q, its gradient is written in one piece. bias (H, T, T) is
    added to the scores. With `causal`, a frame attends to itself and earlier frames. scale defaults
    to D ** -0.5. Returns a contiguous (B, T, S, H*D) tensor. Raises ValueError for incompatible
    shapes and dtypes and for unknown `impl`.
    """
    packed = None
    if k is None or v is None:
        if k is not None or v is not None or q.ndim != 6 or q.shape[3] != 3:
            raise ValueError(
                f"temporal_attention: q has shape {tuple(q.shape)}: want q, k and v, "
                "or one tensor (B, T, S, 3, H, D) alone"
            )
        packed = q
        q, k, v = packed.unbind(3)
    if not q.shape == k.shape == v.shape:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"temporal_attention: q, k and v have shapes {shapes}: want one shape")
    if not q.dtype == k.dtype == v.dtype:
        dtypes = [x.dtype for x in (q, k, v)]
        raise ValueError(f"temporal_attention: q, k and v have dtypes {dtypes}: want one dtype")
    if q.ndim == 4 and heads > 0 and q.shape[-1] % heads == 0:
        q, k, v = (x.unflatten(-1, (heads, x.shape[-1] // heads)) for x in (q, k, v))
    if q.ndim != 5 or q.shape[3] != heads:
        raise ValueError(
            f"temporal_attention: q has shape {tuple(q.shape)}: "
            f"want (B, T, S, H*D) or (B, T, S, H, D) with H={heads}"
        )
    frames = q.shape[1]
    want = (heads, frames, frames)
    if bias is not None and bias.shape != want:
        raise ValueError(f"temporal_attention: bias has shape {tuple(bias.shape)}: want {want}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return run(
        "temporal_attention",
        impl,
        q,
        k,
        v,
        bias=bias,
        causal=causal,
        scale=scale,
        packed=packed,
    )


load("temporal_attention")
