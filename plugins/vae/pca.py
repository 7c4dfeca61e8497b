"""Principal components of space-time patches: a first stage that is fitted in closed form.

As in causal video autoencoders, frame 0 is encoded separately and the others in groups, so an image
is a clip of one frame. The two kinds of patches have separate components.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from plugins._blocks.first_stage import FirstStage
from plugins._blocks.posterior import PointPosterior
from sandbox.contracts import Clip, FirstStageConfig, SizeError, added, in_range, must_divide
from sandbox.registry import register

COLOURS = 3
FLAT = 1e-6  # smallest variance for scaling, relative to the mean variance


class Moments:
    """Sum and second moment of rows (N, D), gathered batch by batch in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = torch.zeros(dim, dtype=torch.float64)
        self.squares = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().double().cpu()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.squares += rows.mT @ rows

    def components(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (D,), leading eigenvectors (D, number), their variances (number,), largest first."""
        mean = self.total / self.count
        variance, basis = torch.linalg.eigh(self.squares / self.count - mean.outer(mean))
        variance = variance.flip(0)[:number].clamp_min(0)
        basis = basis.flip(1)[:, :number]
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        return mean, basis * largest.sign(), variance  # makes the sign of eigenvectors unique


class Components(nn.Module):
    """Patches (..., D) <-> coefficients (..., C). Before a fit: the first C values of a patch."""

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("basis", torch.eye(dim, components))
        self.register_buffer("scale", torch.ones(components))

    def fit(self, moments: Moments, whitening: float) -> None:
        """Sets mean, basis and scale: sd_i^-w rms^(w-1) with w = whitening."""
        mean, basis, variance = moments.components(self.basis.shape[1])
        power = variance.mean()
        sd = variance.clamp_min(FLAT * power).sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(basis)
        mixed = sd ** (2 * whitening) * power.sqrt() ** (2 - 2 * whitening)
        self.scale.copy_(mixed.rsqrt() if power > 0 else torch.ones_like(sd))

    def project(self, patches: Tensor) -> Tensor:
        return (patches - self.mean) @ self.basis

    def restore(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.basis.mT + self.mean


@register("vae", "pca")
class PatchPCA(FirstStage):
    """Space-time patch PCA, fitted in closed form."""

    @dataclass
    class Config(FirstStageConfig):
        """whitening: 0 keeps the ratios of the components' standard deviations, 1 makes all equal.

        Between them, ratios have the power 1 - whitening: more weight for the large components.
        """

        may_differ: ClassVar[tuple[str, ...]] = (*FirstStageConfig.may_differ, "fit_clips")

        components: int = 32  # latent channels
        patch: int = 4  # height and width of a patch in pixels
        group: int = 4  # frames per patch, after frame 0
        fit_clips: int = 1024
        whitening: float = added(0.5)

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from in_range("patch", self.patch, 1)
            yield from in_range("group", self.group, 1)
            yield from in_range("fit_clips", self.fit_clips, 1)
            yield from in_range("whitening", self.whitening, 0, 1)
            if self.patch >= 1:  # frame 0 has the smaller patch
                yield from in_range("components", self.components, 1, 3 * self.patch**2)

        def latents(self, clip: Clip) -> Clip:
            if clip.channels != 3:
                raise SizeError("channels", clip.channels, "3")
            must_divide("height", clip.height, self.patch)
            must_divide("width", clip.width, self.patch)
            groups, rest = divmod(clip.frames - 1, self.group)
            if clip.frames < 1 or rest:
                raise SizeError("frames", clip.frames, f"1 plus a multiple of {self.group}")
            return Clip(
                self.components, 1 + groups, clip.height // self.patch, clip.width // self.patch
            )

        def fitted(self) -> str:
            return "closed_form"

        def regularizer(self) -> str:
            return "none"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg.components)
        self.cfg = cfg
        self.first = Components(COLOURS * cfg.patch**2, cfg.components)
        self.rest = Components(COLOURS * cfg.patch**2 * cfg.group, cfg.components)

    def patches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 1 + k * group, H, W) -> frame 0 (B, 1, h, w, D), groups (B, k, h, w, D')."""
        cut = "b c (t s) (h p) (w q) -> b t h w (s p q c)"
        p = self.cfg.patch
        first = rearrange(x[:, :, :1], cut, s=1, p=p, q=p)
        return first, rearrange(x[:, :, 1:], cut, s=self.cfg.group, p=p, q=p)

    def encode(self, x: Tensor) -> PointPosterior:
        first, rest = self.patches(x)
        z = torch.cat((self.first.project(first), self.rest.project(rest)), dim=1)
        return PointPosterior(rearrange(z, "b t h w c -> b c t h w"))

    def posterior(self, stored: Tensor) -> PointPosterior:
        return PointPosterior(stored)

    def pixels(self, z: Tensor) -> Tensor:
        z = rearrange(z, "b c t h w -> b t h w c")
        join = "b t h w (s p q c) -> b c (t s) (h p) (w q)"
        p = self.cfg.patch
        first = rearrange(self.first.restore(z[:, :1]), join, s=1, p=p, q=p)
        rest = rearrange(self.rest.restore(z[:, 1:]), join, s=self.cfg.group, p=p, q=p)
        return torch.cat((first, rest), dim=2)

    def factors(self, frames: int) -> Tensor:
        """Scales (C, frames, 1, 1); frame 0 has its own."""
        columns = [self.first.scale, *[self.rest.scale] * (frames - 1)]
        return torch.stack(columns, dim=1)[..., None, None]

    def scaled(self, z: Tensor) -> Tensor:
        return z * self.factors(z.shape[2])

    def unscaled(self, z: Tensor) -> Tensor:
        return z / self.factors(z.shape[2])

    @torch.no_grad()
    def fit(self, videos: Tensor | Iterable[Tensor]) -> None:
        """Fits both sets of components to the first `fit_clips` clips.

        `videos` is one tensor (B, 3, T, H, W) in [-1, 1] or batches of that shape. Clips of one
        frame do not change the components of the groups. Deterministic. Raises ValueError without
        clips.
        """
        first = Moments(self.first.mean.numel())
        rest = Moments(self.rest.mean.numel())
        left = self.cfg.fit_clips
        for x in [videos] if isinstance(videos, Tensor) else videos:
            for moments, rows in zip((first, rest), self.patches(x[:left]), strict=True):
                moments.add(rows.flatten(0, 3))
            left -= min(left, len(x))
            if not left:
                break
        if not first.count:
            raise ValueError("fit needs at least one clip")
        self.first.fit(first, self.cfg.whitening)
        if rest.count:
            self.rest.fit(rest, self.cfg.whitening)
