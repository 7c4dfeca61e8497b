"""torch's Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW for the rest."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from plugins._blocks.optimizers import can_fuse, keep_settings
from sandbox.contracts import BackboneConfig, ConfigError, OptimizerConfig, above, in_range
from sandbox.registry import register


class MuonAndAdamW(Optimizer):
    """Two optimizers with shared state and parameter groups; a group has the flag `muon`."""

    def __init__(self, muon: torch.optim.Muon, adamw: AdamW) -> None:
        self.parts = {True: muon, False: adamw}
        groups = [
            {**g, "muon": is_muon}
            for is_muon, part in self.parts.items()
            for g in part.param_groups
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_muon, part in self.parts.items():
            # Set in every step, since load_state_dict replaces both.
            part.param_groups = [g for g in self.param_groups if g["muon"] is is_muon]
            part.state = self.state
            part.step()
        return loss


@register("optimizer", "muon")
class MuonPlugin:
    """Muon for the weight matrices of attention and MLP blocks, AdamW for all others."""

    @dataclass
    class Config(OptimizerConfig):
        """Muon updates 2-D parameters whose names match `include` and not `exclude` (regex).

        lr_factor: Muon's learning rate in units of the top-level `lr`, so that one sweep changes
        both; 5 x 4e-3 = 0.02.
        """

        elementwise = False
        lr_factor: float = 5.0
        momentum: float = 0.95
        weight_decay: float = 0.01  # of both optimizers
        include: tuple[str, ...] = (r"block.*\.(attn|attention|cross|mlp|ff|proj|to_)",)
        exclude: tuple[str, ...] = (r"ada_?ln|modulation|embed|norm|time|emb_layers",)
        betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
        eps: float = 1e-8  # AdamW's

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from above("lr_factor", self.lr_factor, 0)
            yield from in_range("weight_decay", self.weight_decay, 0, 1e300)
            yield from above("eps", self.eps, 0)
            for name, value in [
                ("momentum", self.momentum),
                *((f"betas[{i}]", b) for i, b in enumerate(self.betas)),
            ]:
                if not 0 <= value < 1:
                    yield f"{name}={value}: want >= 0 and < 1"
            for field, patterns in (("include", self.include), ("exclude", self.exclude)):
                for i, pattern in enumerate(patterns):
                    try:
                        re.compile(pattern)
                    except re.error as e:
                        yield f"{field}[{i}]={pattern!r}: not a regular expression ({e})"

        def accepts(self, backbone: BackboneConfig) -> Iterator[str]:
            if not backbone.has_matrices():
                yield "muon: needs 2-D weights, this backbone's blocks are convolutions; use adamw"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def is_hidden(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether Muon updates this parameter."""
        found = [any(re.search(p, name) for p in ps) for ps in (self.cfg.include, self.cfg.exclude)]
        return parameter.ndim == 2 and found == [True, False]

    def build(self, named: Iterable[tuple[str, nn.Parameter]], lr: float) -> Optimizer:
        """Optimizer of the trainable parameters of `named`; `lr` is AdamW's peak learning rate.

        Raises ConfigError if no parameter gets Muon.
        """
        cfg, trained = self.cfg, [(n, p) for n, p in named if p.requires_grad]
        hidden = [p for n, p in trained if self.is_hidden(n, p)]
        rest = [p for n, p in trained if not self.is_hidden(n, p)]
        if not hidden:
            matrices = [n for n, p in trained if p.ndim == 2]
            raise ConfigError(
                f"optimizer.include={list(cfg.include)}: matches no 2-D parameter; "
                f"there are {', '.join(matrices[:5]) or 'none'}; "
                "use optimizer=adamw or set optimizer.include"
            )
        muon = torch.optim.Muon(
            hidden, lr=cfg.lr_factor * lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
        )
        # A group, since AdamW rejects an empty list and a model can have only matrices.
        adamw = AdamW(
            [{"params": rest}],
            lr=lr,
            betas=cfg.betas,
            weight_decay=cfg.weight_decay,
            eps=cfg.eps,
            fused=can_fuse(rest) or None,
        )
        return keep_settings(MuonAndAdamW(muon, adamw))
