"""torch's AdamW (Loshchilov & Hutter 2019, 1711.05101)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer

from plugins._blocks.optimizers import can_fuse, keep_settings
from sandbox.contracts import OptimizerConfig, above, in_range
from sandbox.registry import register


@register("optimizer", "adamw")
class AdamWPlugin:
    """AdamW for all trainable parameters; fused where torch supports it."""

    @dataclass
    class Config(OptimizerConfig):
        """decay_vectors: whether weight decay applies to biases and norm scales."""

        betas: tuple[float, float] = (0.9, 0.95)
        weight_decay: float = 0.01
        eps: float = 1e-8
        decay_vectors: bool = True

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            for i, beta in enumerate(self.betas):
                if not 0 <= beta < 1:
                    yield f"betas[{i}]={beta}: want >= 0 and < 1"
            yield from in_range("weight_decay", self.weight_decay, 0, 1e300)
            yield from above("eps", self.eps, 0)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def build(self, named: Iterable[tuple[str, nn.Parameter]], lr: float) -> Optimizer:
        """Optimizer of the trainable parameters of `named`; `lr` is the peak learning rate."""
        cfg, trained = self.cfg, [p for _, p in named if p.requires_grad]
        bare = [] if cfg.decay_vectors else [p for p in trained if p.ndim < 2]
        decayed = trained if cfg.decay_vectors else [p for p in trained if p.ndim >= 2]
        groups = [
            {"params": decayed, "weight_decay": cfg.weight_decay},
            {"params": bare, "weight_decay": 0.0},
        ]
        optimizer = AdamW(
            [g for g in groups if g["params"]],
            lr=lr,
            betas=cfg.betas,
            eps=cfg.eps,
            fused=can_fuse(trained) or None,
        )
        # With fp16, Lightning clips only if the optimizer leaves unscaling to it.
        optimizer._step_supports_amp_scaling = False
        return keep_settings(optimizer)
