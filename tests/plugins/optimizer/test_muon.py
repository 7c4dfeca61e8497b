"""Muon for matrices inside blocks, AdamW for the rest, in one optimizer."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from plugins.optimizer.muon import MuonPlugin
from sandbox.contracts import ConfigError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(6, 6)
        self.attn = nn.Linear(6, 18)
        self.mlp = nn.Sequential(nn.Linear(18, 12), nn.GELU(), nn.Linear(12, 6))

    def forward(self, x):
        return x + self.mlp(self.attn(x) * self.modulation(x).repeat(1, 3))


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.patch_in, self.patch_out = nn.Linear(4, 6), nn.Linear(6, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.patch_in(x)
        for block in self.blocks:
            x = block(x)
        return self.patch_out(x)


HIDDEN = {f"blocks.{i}.{m}.weight" for i in range(2) for m in ("attn", "mlp.0", "mlp.2")}


def optimizer(model: nn.Module, lr: float = 4e-3, **settings) -> torch.optim.Optimizer:
    return MuonPlugin(MuonPlugin.Config(**settings)).build(model.named_parameters(), lr)


def train(model: nn.Module, opts: list, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        for opt in opts:
            opt.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_matrices_of_attention_and_mlp_get_muon_and_nothing_else_does():
    model = Net()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = optimizer(model).param_groups
    assert {names[id(p)] for g in groups if g["muon"] for p in g["params"]} == HIDDEN
    assert sum(len(g["params"]) for g in groups) == len(names)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("backbone.blocks.0.attn.to_qkv.weight", True),
        ("backbone.blocks.3.cross.to_out.weight", True),
        ("backbone.blocks.3.mlp.0.weight", True),
        ("backbone.blocks.3.modulation.weight", False),
        ("backbone.time.mlp.0.weight", False),
        ("backbone.patch_in.weight", False),
        ("backbone.transformer_blocks.1.ff.net.0.proj.weight", True),
        ("backbone.transformer_blocks.1.norm1.linear.weight", False),
        ("backbone.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight", True),
        ("backbone.input_blocks.1.0.emb_layers.1.weight", False),
        ("conditioning.words.weight", False),
    ],
)
def test_names_of_our_and_published_models_are_assigned(name, hidden):
    plugin = MuonPlugin(MuonPlugin.Config())
    assert plugin.is_hidden(name, nn.Parameter(torch.zeros(2, 2))) is hidden


def test_steps_equal_the_two_optimizers_side_by_side():
    ours, plain = Net(), Net()
    train(ours, [optimizer(ours)], 0, 5)
    hidden = [p for n, p in plain.named_parameters() if n in HIDDEN]
    rest = [p for n, p in plain.named_parameters() if n not in HIDDEN]
    muon = torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.01)
    adamw = torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    train(plain, [muon, adamw], 0, 5)
    assert same(ours, plain)


def test_one_learning_rate_scales_both_optimizers():
    lrs = {g["muon"]: g["lr"] for g in optimizer(Net(), lr=1e-3).param_groups}
    assert lrs == {True: 5e-3, False: 1e-3}


def test_learning_rate_zero_changes_nothing():
    model = Net()
    train(model, [optimizer(model, lr=0.0)], 0, 2)
    assert same(model, Net())


def test_resumed_training_equals_the_uninterrupted_one_bit_for_bit():
    straight, resumed = Net(), Net()
    train(straight, [optimizer(straight)], 0, 6)
    first = optimizer(resumed)
    train(resumed, [first], 0, 3)
    second = optimizer(resumed)
    second.load_state_dict(first.state_dict())
    train(resumed, [second], 3, 6)
    assert same(straight, resumed)


def test_state_can_be_saved_as_a_checkpoint(tmp_path):
    from sandbox import checkpoint

    model = Net()
    opt = optimizer(model)
    train(model, [opt], 0, 2)
    state = {"optimizer": opt.state_dict()}
    optimizer(Net()).load_state_dict(
        checkpoint.load(checkpoint.save(tmp_path, state, 2))["optimizer"]
    )


def test_a_schedule_scales_both_optimizers():
    opt = optimizer(Net())
    schedule = LambdaLR(opt, lambda n: 0.5**n)
    opt.step()
    schedule.step()
    assert [g["lr"] for g in opt.param_groups] == [0.01, 0.002]


def test_a_closure_provides_loss_and_gradients():
    model = Net()
    opt = optimizer(model)

    def closure():
        opt.zero_grad()
        loss = model(torch.ones(1, 4)).square().mean()
        loss.backward()
        return loss

    assert opt.step(closure).item() > 0
    assert not same(model, Net())


def test_a_model_without_matching_matrices_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.include.*0\.weight.*adamw"):
        optimizer(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_of_matching_matrices_only_trains():
    model = nn.ModuleDict({"block": nn.ModuleDict({"attn": nn.Linear(2, 2, bias=False)})})
    opt = optimizer(model)
    model["block"]["attn"](torch.ones(1, 2)).sum().backward()
    opt.step()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lr_factor": 0.0, "momentum": 1.0}, ["lr_factor", "momentum"]),
        ({"include": ("(",)}, ["include[0]"]),
        ({"exclude": ("a", "[")}, ["exclude[1]"]),
        (
            {"weight_decay": float("nan"), "eps": -1.0, "betas": (0.9, 2.0)},
            ["weight_decay", "eps", "betas[1]"],
        ),
    ],
)
def test_every_bad_setting_is_named(settings, named):
    found = list(MuonPlugin.Config(**settings).problems())
    assert [p.partition("=")[0] for p in found] == named
