"""Passes of a sampling run, from a backbone to latents."""

import pytest
import torch
from torch import Tensor

from plugins.guidance.cfg import ClassifierFree
from plugins.guidance.none import NoGuidance
from plugins.sampler.euler import Euler
from plugins.sampler.heun import Heun
from plugins.schedule.ddpm import DDPM
from plugins.schedule.flow import Flow
from sandbox.contracts import Conditions, Pass
from sandbox.data.randomness import Keyed
from sandbox.model.sampling import KnownRegion, concatenate, denoise

FLOW = Flow(Flow.Config())
CFG = ClassifierFree(ClassifierFree.Config(guidance_scale=3.0))
EULER = Euler(Euler.Config())


def draws(size: int = 2) -> Keyed:
    return Keyed(0, 0, torch.arange(size), size)


def start(size: int = 2) -> Tensor:
    return draws(size).normal("start", torch.empty(size, 3, 2, 4, 4))


class Backbone:
    """Moves towards the mean of its context; counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.times: list[float] = []

    def __call__(self, z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        assert len(z_t) == len(t) == len(cond.context)
        assert not torch.is_grad_enabled()
        self.batches.append(len(z_t))
        self.times.append(t.max().item())
        return z_t - cond.context.mean((1, 2)).view(-1, 1, 1, 1, 1)


def conditions(*lengths: int) -> list[tuple[Pass, Conditions]]:
    """The full pass and one without text, with contexts of these lengths."""
    passes = (Pass(), Pass(frozenset({"text"})))
    scalars = {"fps": torch.full((2,), 8.0)}
    return [
        (passes[i], Conditions(torch.full((2, length, 5), float(i)), scalars=scalars))
        for i, length in enumerate(lengths)
    ]


def test_passes_of_one_shape_run_as_one_batch():
    backbone = Backbone()
    denoise(backbone, FLOW, CFG, conditions(4, 4), EULER, start(), 3, draws())
    assert backbone.batches == [4, 4, 4]


def test_passes_of_other_shapes_run_one_after_another_with_the_same_result():
    together, apart = Backbone(), Backbone()
    got = denoise(together, FLOW, CFG, conditions(4, 4), EULER, start(), 3, draws())
    also = denoise(apart, FLOW, CFG, conditions(4, 7), EULER, start(), 3, draws())
    assert apart.batches == [2] * 6
    torch.testing.assert_close(got, also)  # contexts are constant: their length changes nothing


def test_guidance_is_applied_to_the_raw_outputs():
    backbone = Backbone()
    got = denoise(backbone, FLOW, CFG, conditions(4, 4), EULER, start(), 1, draws())
    full, uncond = start(), start() - 1
    torch.testing.assert_close(got, start() - 0.999 * (uncond + 3 * (full - uncond)))


def test_a_single_pass_needs_no_guidance():
    backbone = Backbone()
    guidance = NoGuidance(NoGuidance.Config())
    denoise(backbone, FLOW, guidance, conditions(4), EULER, start(), 2, draws())
    assert backbone.batches == [2, 2]


SHORT = DDPM(DDPM.Config(timesteps=50, betas=(0.01, 0.2)))


@pytest.mark.parametrize(("schedule", "most"), [(FLOW, 1000), (SHORT, 50)])
def test_the_backbone_sees_times_of_a_thousand_or_of_the_schedule(schedule, most):
    backbone = Backbone()
    denoise(backbone, schedule, CFG, conditions(4, 4), EULER, start(), 5, draws())
    assert 0.95 * most < backbone.times[0] < most and backbone.times == sorted(backbone.times)[::-1]


def test_progress_is_reported_after_every_call():
    calls = []
    heun = Heun(Heun.Config())
    progress = lambda step, steps: calls.append((step, steps))  # noqa: E731
    denoise(Backbone(), FLOW, CFG, conditions(4, 4), heun, start(), 2, draws(), progress=progress)
    assert calls == [(0, 2), (0, 2), (1, 2)]


def test_known_regions_are_kept():
    """Where the mask is 1 the last call sees the known latents, and Euler continues from them."""
    known, mask = torch.full((2, 3, 2, 4, 4), 5.0), torch.zeros(1, 1, 1, 4, 4)
    mask[..., :2] = 1
    hooks = KnownRegion(FLOW, known, mask, draws())
    seen = []

    def backbone(z_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        seen.append(z_t[:2])
        return torch.zeros_like(z_t)

    denoise(backbone, FLOW, CFG, conditions(4, 4), EULER, start(), 2, draws(), hooks)
    t = FLOW.times(2, "trailing")[1:].expand(2)
    eps = draws().normal(f"known_region_{t[0].item()}", known)
    torch.testing.assert_close(seen[1][..., :2], FLOW.noised(known, eps, t)[..., :2])
    torch.testing.assert_close(seen[1][..., 2:], start()[..., 2:])


def test_joining_keeps_every_slot():
    one = Conditions(
        context=torch.zeros(2, 4, 5),
        context_mask=torch.ones(2, 4, dtype=torch.bool),
        concat=torch.zeros(2, 1, 2, 4, 4),
        scalars={"fps": torch.zeros(2)},
    )
    both = concatenate([one, one])
    shapes = {name: tuple(x.shape) for name, x in both.tensors()}
    assert shapes == {
        "context": (4, 4, 5),
        "context_mask": (4, 4),
        "concat": (4, 1, 2, 4, 4),
        "fps": (4,),
    }
    assert both.vector is None and both.image_context is None


def test_passes_with_other_slots_are_not_joined():
    assert concatenate([Conditions(vector=torch.zeros(2, 3)), Conditions()]) is None


def test_passes_without_conditions_are_joined():
    assert list(concatenate([Conditions(), Conditions()]).tensors()) == []
