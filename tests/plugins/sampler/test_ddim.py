"""DDIM and ancestral sampling against recorded trajectories of LDM, DynamiCrafter and CogVideoX."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plugins._blocks.diffusion import CLEAN, levels
from plugins.guidance.cfg import ClassifierFree
from plugins.guidance.text_image import TextImage
from plugins.sampler.ddim import DDIM
from plugins.sampler.ddpm import posterior_step
from plugins.schedule.ddpm import DDPM
from sandbox.contracts import Denoised
from sandbox.data.randomness import Recorded
from sandbox.model.sampling import KnownRegion, PlainHooks, Quantised
from tests.golden_weights import GOLDEN, recording, weight

LDM = DDPM(DDPM.Config(betas=(0.0015, 0.0195)))
DYNAMICRAFTER = DDPM(DDPM.Config(zero_terminal_snr=True, prediction="v", base_scale=0.7))


def close(name: str, got: Tensor, want: Tensor, tolerance: dict) -> None:
    torch.testing.assert_close(got, want, **tolerance, msg=lambda m: f"{name}: {m}")


class Record(PlainHooks):
    """Records states before each model call and clean estimates after it."""

    def __init__(self, *inner: PlainHooks) -> None:
        self.inner, self.states, self.z0 = inner, [], []

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        self.states.append(z_t)
        for hooks in self.inner:
            z_t = hooks.before(z_t, t)
        return z_t

    def denoised(self, d: Denoised, t: Tensor) -> Denoised:
        for hooks in self.inner:
            d = hooks.denoised(d, t)
        self.z0.append(d.z0)
        return d


def ldm_stub(facts: dict):
    mix, bias = (weight("ldm", facts["weights"]["unet"][k]) for k in "Ab")

    def model(z: Tensor, t: Tensor, step: int) -> Tensor:
        out = torch.einsum("oc,bcthw->bothw", mix, z) + bias.view(1, -1, 1, 1, 1)
        return out + 0.3 * torch.cos(t / 200).view(-1, 1, 1, 1, 1)

    return model


def nearest(codebook: Tensor):
    def quantise(z: Tensor) -> Tensor:
        flat = z.movedim(1, -1)
        return (
            codebook[torch.cdist(flat.reshape(-1, 3), codebook).argmin(1)]
            .view_as(flat)
            .movedim(-1, 1)
        )

    return quantise


@pytest.mark.parametrize(
    "case", ["eta0", "eta1", "eta0_quantize_x0", "steps_not_dividing", "eta0_mask"]
)
def test_ldm_trajectories_are_reproduced(case):
    facts, tensors = recording("ldm", "ddim")
    steps, kwargs = facts["cases"][case]["steps"], facts["cases"][case]["kwargs"]
    cfg = DDIM.Config(
        spacing="uniform",
        end="first",
        eta=kwargs["eta"],
        temperature=kwargs.get("temperature", 1.0),
    )
    times = facts["cases"][case]["timesteps_visited"]
    noise = tensors.get(f"in/{case}/noise", torch.zeros(0))
    draws = Recorded({f"sampler_noise_{i}": n[:, :, None] for i, n in enumerate(noise)})
    inner = []
    if kwargs.get("quantize_x0"):
        codebook = facts["weights"]["first_stage"]["quantize.embedding.weight"]
        inner = [Quantised(nearest(weight("ldm", codebook)))]
    if "mask" in kwargs:
        known = dict(zip(times, tensors[f"in/{case}/q_noise"][:, :, :, None], strict=True))
        region = Recorded({f"known_region_{t}": n for t, n in known.items()})
        z0, mask = tensors["in/x0"][:, :, None], tensors["in/mask"][:, :, None]
        inner = [KnownRegion(LDM, z0, mask, region)]
    hooks, z = Record(*inner), tensors["in/x_T"][:, :, None]
    end = DDIM(cfg)(ldm_stub(facts), LDM, z, steps, draws, hooks)
    got = torch.stack([*hooks.states[1:], end])[:, :, :, 0]
    close("x", got, tensors[f"out/{case}/x"], facts["tolerance"])
    z0 = torch.stack(hooks.z0)[:, :, :, 0]
    close("pred_x0", z0, tensors[f"out/{case}/pred_x0"], facts["tolerance"])


def test_ldm_ancestral_steps_are_reproduced():
    """Single steps from t to t - 1 at recorded times, each from the previous result."""
    facts, tensors = recording("ldm", "ddim")
    z, model = tensors["in/x_T"][:, :, None], ldm_stub(facts)
    for i, time in enumerate(facts["ancestral_t_sequence"]):
        t = torch.full((2,), time)
        d = LDM.denoised(model(z, t, i), z, t)
        (level,) = levels(LDM, t[:1])
        (below,) = levels(LDM, t[:1] - 1) if time else (CLEAN,)
        keep, pull, variance, _ = posterior_step(level, below)
        z = keep * z + pull * d.z0 + variance**0.5 * tensors["in/ancestral/noise"][i][:, :, None]
        close(
            f"pred_x0 {time}",
            d.z0[:, :, 0],
            tensors["out/ancestral/pred_x0"][i],
            facts["tolerance"],
        )
        close(f"x {time}", z[:, :, 0], tensors["out/ancestral/x"][i], facts["tolerance"])


def dynamicrafter_stub(facts: dict, tensors: dict[str, Tensor], context: Tensor):
    a, b = (weight("dynamicrafter", facts["weights"]["unet"][k]) for k in "AB")
    conditioning = torch.einsum("oc,bcthw->bothw", b, tensors["in/concat"])
    offset = 0.05 * context.mean((1, 2)) + 0.01 * tensors["in/fs"]
    conditioning = conditioning + offset.view(-1, 1, 1, 1, 1)

    def model(z: Tensor, t: Tensor) -> Tensor:
        out = torch.einsum("oc,bcthw->bothw", a, z) + conditioning
        return out + 0.3 * torch.cos(t / 200).view(-1, 1, 1, 1, 1)

    return model


@pytest.mark.parametrize(
    "case",
    [
        "trailing_eta0_cfg_rescale",
        "trailing_eta1_cfg_rescale",
        "uniform_eta0_nocfg",
        "multicond_eta0",
    ],
)
def test_dynamicrafter_trajectories_are_reproduced(case):
    facts, tensors = recording("dynamicrafter", "ddim")
    this = facts["cases"][case]
    kwargs = this["kwargs"]
    full, uncond, image = (
        dynamicrafter_stub(facts, tensors, tensors[f"in/{name}"])
        for name in ("context", "uncond_context", "uncond_context_img_nonetext")
    )
    scales = {
        "guidance_scale": kwargs.get("unconditional_guidance_scale", 1.0),
        "guidance_rescale": kwargs.get("guidance_rescale", 0.0),
    }
    if "cfg_img" in kwargs:
        guidance = TextImage(TextImage.Config(cfg_img=kwargs["cfg_img"], **scales))
    else:
        guidance = ClassifierFree(ClassifierFree.Config(**scales))

    def model(z: Tensor, t: Tensor, step: int) -> Tensor:
        passes = guidance.passes(("text", "image"))
        models = {0: full, 1: image, 2: uncond}  # by the number of dropped signals
        outs = [models[len(p.dropped)](z, t) for p in passes]
        return guidance.combine(outs, t, step, this["steps"])

    spacing = kwargs["timestep_spacing"].removeprefix("uniform_")
    sampler = DDIM(DDIM.Config(spacing=spacing, eta=kwargs["eta"], end="first"))
    noise = tensors.get(f"in/{case}/noise", torch.zeros(0))
    draws = Recorded({f"sampler_noise_{i}": n for i, n in enumerate(noise)})
    hooks = Record()
    end = sampler(model, DYNAMICRAFTER, tensors["in/x_T"], this["steps"], draws, hooks)
    got = torch.stack([*hooks.states[1:], end])
    close("x", got, tensors[f"out/{case}/x"], facts["tolerance"])
    # recorded estimates have the rescaling of the level at the end of the step
    scale = torch.tensor(this["ddim_scale_arr_prev"][::-1]).view(-1, 1, 1, 1, 1, 1)
    close("x0", torch.stack(hooks.z0) * scale, tensors[f"out/{case}/pred_x0"], facts["tolerance"])


@pytest.mark.parametrize("variant", ["2b", "5b"])
@pytest.mark.parametrize("steps", [5, 7])
def test_cogvideox_trajectories_are_reproduced(variant, steps):
    """7 does not divide 1000: steps end between times, and the last one is not clean."""
    want = {
        k.removeprefix(f"{variant}/N{steps}/"): v
        for k, v in load_file(GOLDEN / "cogvideox/scheduler.safetensors").items()
    }
    schedule = DDPM(
        DDPM.Config(
            zero_terminal_snr=True, prediction="v", snr_shift={"2b": 3.0, "5b": 1.0}[variant]
        )
    )
    sampler, hooks = DDIM(DDIM.Config(landing="stride")), Record()
    end = sampler(
        lambda z, t, step: want["model_outputs_v"][step],
        schedule,
        want["x_T"],
        steps,
        Recorded({}),
        hooks,
    )
    got = torch.stack([*hooks.states[1:], end])
    close("x", got, want["ddim_x"], {"atol": 1e-5, "rtol": 1e-5})


def test_ending_at_the_first_time_keeps_its_noise_level():
    z = torch.ones(1, 1, 1, 1, 1)
    sampler = DDIM(DDIM.Config(end="first"))
    got = sampler(lambda z, t, step: torch.zeros_like(z), LDM, z, 1, Recorded({}))
    first = torch.tensor([0])
    want = LDM.alpha(first) / LDM.alpha(torch.tensor([999])) * z  # eps is estimated as 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_one_step_from_pure_noise_is_finite():
    """The rescaling of z0 is unknown at pure noise, so that the end is not rescaled."""
    z = torch.ones(1, 1, 1, 1, 1)
    got = DDIM(DDIM.Config(end="first"))(lambda z, t, s: z, DYNAMICRAFTER, z, 1, Recorded({}))
    assert got.isfinite().all()
