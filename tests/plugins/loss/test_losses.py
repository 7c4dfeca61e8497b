"""Losses against recorded steps, and their algebra."""

import pytest
import torch
from torch import Tensor

from plugins.loss.hybrid import Hybrid
from plugins.loss.ldm import LDMLoss
from plugins.loss.mse import MSE
from plugins.schedule.ddpm import DDPM
from plugins.schedule.flow import Flow
from tests.golden_easyanimate import near, recorded
from tests.golden_weights import recording, weight

LOSSES = {"mse": MSE(MSE.Config()), "ldm": LDMLoss(LDMLoss.Config())}


def check(facts: dict, terms, gradients: dict[str, Tensor]) -> None:
    """Logged values, total and gradients of a recorded step."""
    tolerance = facts["tolerance"]
    for name, want in facts["loss_train"].items():
        got = terms.log[name.removeprefix("train/")]
        torch.testing.assert_close(
            got, torch.tensor(want), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert set(terms.log) == {n.removeprefix("train/") for n in facts["loss_train"]}
    terms.total.backward()
    for name, want in facts["grad_l2_unet"].items():
        got = gradients[name.rpartition(".")[2]].grad.norm()
        torch.testing.assert_close(got, torch.tensor(want), **tolerance)


def test_an_ldm_step_is_reproduced():
    facts, tensors = recording("ldm", "loss")
    mix, bias = (weight("ldm", facts["weights"]["unet"][k]).requires_grad_() for k in "Ab")
    z0, eps, t = tensors["out/z"][:, :, None], tensors["in/noise"][:, :, None], tensors["in/t"]
    schedule = DDPM(DDPM.Config(betas=(0.0015, 0.0195)))
    z_t = schedule.noised(z0, eps, t)
    out = torch.einsum("oc,bcthw->bothw", mix, z_t) + bias.view(1, -1, 1, 1, 1)
    out = out + 0.3 * torch.cos(t / 200).view(-1, 1, 1, 1, 1)
    check(facts, LOSSES["ldm"](schedule, out, z0, eps, t), {"A": mix, "b": bias})


def test_a_dynamicrafter_step_is_reproduced():
    facts, tensors = recording("dynamicrafter", "conditioning_and_loss")
    a, b = (weight("dynamicrafter", facts["weights"]["unet"][k]).requires_grad_() for k in "AB")
    z0, eps, t = tensors["out/z"], tensors["in/noise"], tensors["in/t"]
    schedule = DDPM(DDPM.Config(zero_terminal_snr=True, prediction="v", base_scale=0.7))
    z_t = schedule.noised(z0, eps, t)
    concat = tensors["out/c_concat_frame"][:, :, None].expand_as(z_t)
    out = torch.einsum("oc,bcthw->bothw", a, z_t) + torch.einsum("oc,bcthw->bothw", b, concat)
    conditioning = 0.05 * tensors["out/c_crossattn"].mean((1, 2)) + 0.01 * tensors["out/fs"]
    out = out + (conditioning + 0.3 * torch.cos(t / 200)).view(-1, 1, 1, 1, 1)
    check(facts, LOSSES["ldm"](schedule, out, z0, eps, t), {"A": a, "B": b})


LEARNED = DDPM(DDPM.Config(beta_schedule="linear", betas=(1e-4, 0.02), learned_variance=True))


@pytest.mark.parametrize(("name", "below"), [("plain", 0), ("snr", 250)])
def test_the_hybrid_loss_of_easyanimate_is_reproduced(name, below):
    want = recorded("diffusion_loss")
    z0, eps, t = want["in.x_start"], want["in.noise"], want["in.timestep"].long()
    z_t = LEARNED.noised(z0, eps, t)
    near("x_t", z_t, want["out.x_t"])
    assert torch.equal(LEARNED.inputs(z_t, t)[1], want["out.model_timestep"].long())
    out = want["in.model_output"]
    near("vb", Hybrid.bound(LEARNED, out, z0, z_t, t), want[f"out.{name}.vb"])
    terms = Hybrid(Hybrid.Config(x0_below=below))(LEARNED, out, z0, eps, t)
    near("loss", terms.per_sample, want[f"out.{name}.loss"])
    without = Hybrid(Hybrid.Config(x0_below=below, vb_weight=0.0))(LEARNED, out, z0, eps, t)
    near("mse", without.per_sample, want[f"out.{name}.mse"])


def test_the_bound_trains_only_the_variance():
    z0, eps, t = sample(LEARNED)
    out = torch.cat((eps + 1, torch.zeros_like(eps)), 1).requires_grad_()
    Hybrid(Hybrid.Config())(LEARNED, out, z0, eps, t).total.backward()
    prediction, variance = out.grad.chunk(2, 1)
    torch.testing.assert_close(prediction, torch.full_like(eps, 2 / eps.numel()))
    assert variance.abs().amin((1, 2, 3, 4))[1:].min() > 0


def test_vb_weight_null_scales_the_bound_with_the_number_of_times():
    schedule = DDPM(DDPM.Config(timesteps=500, learned_variance=True))
    z0, eps, _ = sample(schedule)
    t, out = torch.tensor([0, 10, 250, 499]), torch.cat((eps, eps), 1)
    bound = Hybrid.bound(schedule, out, z0, schedule.noised(z0, eps, t), t)
    terms = Hybrid(Hybrid.Config(vb_weight=None))(schedule, out, z0, eps, t)
    torch.testing.assert_close(terms.per_sample, 0.5 * bound)


SCHEDULES = {
    "flow": Flow(Flow.Config()),
    "eps": DDPM(DDPM.Config()),
    "v": DDPM(DDPM.Config(prediction="v", zero_terminal_snr=True)),
    "x0": DDPM(DDPM.Config(prediction="x0", min_snr_gamma=5.0)),
}


def sample(schedule) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 4, 2, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 10, 500, 999])
    return z0, eps, t if schedule.cfg.kind == "discrete" else t / 1000


@pytest.mark.parametrize(
    ("loss", "schedule"),
    [
        (a, b)
        for a in LOSSES
        for b in SCHEDULES
        if not list(LOSSES[a].cfg.accepts(SCHEDULES[b].cfg))
    ],
)
def test_the_loss_of_the_exact_target_is_0_and_of_an_error_its_square(loss, schedule):
    loss, schedule = LOSSES[loss], SCHEDULES[schedule]
    z0, eps, t = sample(schedule)
    out = schedule.target(z0, eps, t)
    assert loss(schedule, out, z0, eps, t).total.item() == 0
    terms = loss(schedule, out + 0.5, z0, eps, t)
    torch.testing.assert_close(terms.per_sample, 0.25 * schedule.weight(t))
    torch.testing.assert_close(terms.total, terms.per_sample.mean())
    assert terms.per_sample.shape == (4,) and terms.log["loss"] == terms.total


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_predictions_are_compared_in_float32(loss):
    schedule = SCHEDULES["v"]
    z0, eps, t = sample(schedule)
    out = torch.zeros_like(z0).bfloat16().requires_grad_()
    terms = LOSSES[loss](schedule, out, z0, eps, t)
    assert terms.total.dtype == torch.float32
    terms.total.backward()
    assert out.grad.dtype == torch.bfloat16 and out.grad.isfinite().all()


def test_the_velocity_of_bf16_latents_is_not_rounded():
    schedule = SCHEDULES["flow"]
    z0, eps, t = sample(schedule)
    z0, eps = z0.bfloat16(), eps.bfloat16()
    assert LOSSES["mse"](schedule, eps.float() - z0.float(), z0, eps, t).total.item() == 0


def test_logged_values_are_detached():
    schedule = SCHEDULES["eps"]
    z0, eps, t = sample(schedule)
    for loss in LOSSES.values():
        terms = loss(schedule, torch.zeros_like(z0).requires_grad_(), z0, eps, t)
        assert not any(value.requires_grad for value in terms.log.values())


def test_original_elbo_weight_adds_the_bound():
    schedule = SCHEDULES["eps"]
    z0, eps, t = sample(schedule)
    terms = LDMLoss(LDMLoss.Config(original_elbo_weight=0.5))(schedule, eps + 1, z0, eps, t)
    bound = schedule.elbo_weight(t).mean()
    torch.testing.assert_close(terms.log["loss_vlb"], bound)
    torch.testing.assert_close(terms.total, 1 + 0.5 * bound)


def test_a_learned_logvar_is_one_parameter_for_each_time():
    schedule = SCHEDULES["eps"]
    loss = LDMLoss(LDMLoss.Config(learn_logvar=True, logvar_init=0.5))
    assert {k: v.shape for k, v in loss.state_dict().items()} == {"logvar": (1000,)}
    z0, eps, t = sample(schedule)
    terms = loss(schedule, eps + 1, z0, eps, t)
    assert terms.total.item() == pytest.approx(torch.tensor(-0.5).exp().item() + 0.5)
    assert {"loss_gamma", "logvar"} <= set(terms.log)
    terms.total.backward()
    assert loss.logvar.grad.nonzero().flatten().tolist() == t.tolist()


def test_without_a_learned_logvar_the_state_is_empty():
    assert not LOSSES["ldm"].state_dict()


def test_l1_is_the_absolute_error():
    schedule = SCHEDULES["eps"]
    z0, eps, t = sample(schedule)
    terms = LDMLoss(LDMLoss.Config(loss_type="l1"))(schedule, eps - 0.5, z0, eps, t)
    assert terms.total.item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"loss_type": "huber"}, "loss_type"),
        ({"l_simple_weight": -1.0}, "l_simple_weight"),
        ({"original_elbo_weight": float("nan")}, "original_elbo_weight"),
        ({"logvar_init": 100.0}, "logvar_init"),
        ({"timesteps": 0}, "timesteps"),
    ],
)
def test_a_bad_setting_is_named(settings, field):
    (problem,) = LDMLoss.Config(**settings).problems()
    assert problem.startswith(f"{field}=")


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"vb_weight": -1.0}, "vb_weight"), ({"vb_weight": float("nan")}, "vb_weight"),
     ({"x0_below": -1}, "x0_below")],
)  # fmt: skip
def test_a_bad_setting_of_the_hybrid_loss_is_named(settings, field):
    (problem,) = Hybrid.Config(**settings).problems()
    assert problem.startswith(f"{field}=")


@pytest.mark.parametrize(
    ("loss", "schedule", "part"),
    [
        (MSE.Config(), DDPM.Config(learned_variance=True), "variance"),
        (LDMLoss.Config(), DDPM.Config(learned_variance=True), "variance"),
        (LDMLoss.Config(), Flow.Config(), "integer times"),
        (Hybrid.Config(), DDPM.Config(), "learned_variance=true"),
        (Hybrid.Config(), Flow.Config(), "integer times"),
        (LDMLoss.Config(learn_logvar=True), DDPM.Config(timesteps=500), "timesteps=1000"),
    ],
)
def test_an_incompatible_schedule_is_refused(loss, schedule, part):
    (problem,) = loss.accepts(schedule)
    assert part in problem and "want" in problem
