"""Muon (Jordan et al. 2024, torch's own) for the matrices inside blocks, AdamW for the rest."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from plugins._blocks.optimizers import can_fuse, settings_stay
from sandbox.contracts import BackboneConfig, ConfigError, OptimizerConfig, above, in_range
from sandbox.registry import register


class MuonAndAdamW(Optimizer):
    """Two optimizers with one state and one list of groups; `muon` in a group says whose it is."""

    def __init__(self, muon: torch.optim.Muon, adamw: AdamW) -> None:
        self.parts = {True: muon, False: adamw}
        groups = [
            {**g, "muon": kind} for kind, part in self.parts.items() for g in part.param_groups
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, part in self.parts.items():
            # Set anew each time: load_state_dict replaces both.
            part.param_groups = [g for g in self.param_groups if g["muon"] is kind]
            part.state = self.state
            part.step()
        return loss


@register("optimizer", "muon")
class MuonPlugin:
    """Muon for the weight matrices of attention and MLP inside blocks, AdamW for all others."""

    @dataclass
    class Config(OptimizerConfig):
        """Muon takes the 2-D parameters whose names match `include` and not `exclude` (regex).

        lr_factor: Muon's learning rate in units of the top-level `lr`, so that one sweep moves
        both; 5 x 4e-3 = 0.02.
        """

        elementwise = False
        lr_factor: float = 5.0
        momentum: float = 0.95
        weight_decay: float = 0.01  # of both parts
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
                yield "muon is for matrices, and this backbone's blocks are convolutions; use adamw"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def is_hidden(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether Muon updates this parameter."""
        found = [any(re.search(p, name) for p in ps) for ps in (self.cfg.include, self.cfg.exclude)]
        return parameter.ndim == 2 and found == [True, False]

    def build(self, named: Iterable[tuple[str, nn.Parameter]], lr: float) -> Optimizer:
        """The optimizer of the trainable ones among `named`; `lr` is AdamW's peak learning rate.

        Raises ConfigError where no parameter gets Muon.
        """
        cfg, trained = self.cfg, [(n, p) for n, p in named if p.requires_grad]
        hidden = [p for n, p in trained if self.is_hidden(n, p)]
        rest = [p for n, p in trained if not self.is_hidden(n, p)]
        if not hidden:
            matrices = [n for n, p in trained if p.ndim == 2]
            raise ConfigError(
                f"optimizer.include={list(cfg.include)}: no 2-D parameter has such a name; "
                f"there are {', '.join(matrices[:5]) or 'none'}; "
                "use optimizer=adamw or set optimizer.include"
            )
        muon = torch.optim.Muon(
            hidden, lr=cfg.lr_factor * lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
        )
        # As a group: AdamW refuses an empty list, and a model may have nothing but matrices.
        adamw = AdamW(
            [{"params": rest}],
            lr=lr,
            betas=cfg.betas,
            weight_decay=cfg.weight_decay,
            eps=cfg.eps,
            fused=can_fuse(rest) or None,
        )
        return settings_stay(MuonAndAdamW(muon, adamw))
