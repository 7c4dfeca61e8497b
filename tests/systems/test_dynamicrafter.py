"""DynamiCrafter as a system: a recorded training step and recorded sampling, replayed.

Encoders and network are the stubs of the recording; everything else is our code.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from plugins._blocks.openclip import tokenizer
from plugins._blocks.resampler import Resampler
from plugins.backbone.unet3d import UNet3D
from plugins.conditioning.dynamicrafter import DynamiCrafter
from plugins.guidance.cfg import ClassifierFree
from plugins.guidance.none import NoGuidance
from plugins.guidance.text_image import TextImage
from plugins.loss.ldm import LDMLoss
from plugins.method.denoising import Denoising
from plugins.sampler.ddim import DDIM
from plugins.schedule.ddpm import DDPM
from plugins.vae.kl import AutoencoderKL
from sandbox.config.root import Root
from sandbox.config.wiring import Wiring
from sandbox.contracts import (
    Batch,
    Clip,
    Conditions,
    TrainerConfig,
)
from sandbox.data.randomness import Recorded
from sandbox.model.components import Parts
from sandbox.model.latent_diffusion import LatentDiffusion
from sandbox.model.sampling import PlainHooks, denoise
from tests.golden_weights import filled

GOLDEN = Path(__file__).parents[1] / "golden/dynamicrafter"
TEXT = 77
SCHEDULE = DDPM.Config(prediction="v", zero_terminal_snr=True, base_scale=0.7)


def load(name: str) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(
        GOLDEN / f"{name}.safetensors"
    )


FACTS, TENSORS = load("conditioning_and_loss")
FRAMES = FACTS["temporal_length"]


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, **FACTS["tolerance"])


# --- the recording's stubs ------------------------------------------------------------------------


class Network(nn.Module):
    """A linear network that uses all its conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = (nn.Parameter(torch.empty(4, 4)) for _ in range(2))

    def forward(self, z: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        context = cond.context
        if cond.image_context is not None:
            context = torch.cat([context, cond.image_context.flatten(1, 2)], 1)
        mixed = [
            torch.einsum("oc,bcthw->bothw", weights, x)
            for weights, x in ((self.A, z), (self.B, cond.concat))
        ]
        shift = 0.3 * (t / 200).cos() + 0.05 * context.mean((1, 2)) + 0.01 * cond.scalars["fps"]
        return mixed[0] + mixed[1] + shift.view(-1, 1, 1, 1, 1)


class Text(nn.Module):
    """Caption "k" is row k of a table, "" is row 0."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(5, TEXT, 8))
        self.known = tokenizer()(["", "1", "2", "3", "4"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[(ids[:, None] == self.known).all(-1).int().argmax(-1)]


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.empty(3, 10))

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, (2, 3)).flatten(2).transpose(1, 2) @ self.M


def stub(module: nn.Module, name: str) -> nn.Module:
    module.load_state_dict(filled("dynamicrafter", FACTS["weights"][name]))
    return module


def conditioner(**settings) -> DynamiCrafter:
    sizes = FACTS["resampler"]
    names = ("dim", "depth", "dim_head", "heads", "num_queries", "ff_mult", "video_length")
    made = DynamiCrafter(
        DynamiCrafter.Config(
            text_width=8, vision_width=16, fps_condition_type="fps",
            uncond_prob=FACTS["params"]["uncond_prob"],
            **{k: sizes[k] for k in names}, **settings,
        )
    )  # fmt: skip
    made.cond_stage_model = stub(Text(), "text").requires_grad_(False)
    made.embedder = stub(Image(), "image").requires_grad_(False)
    made.image_proj_model = stub(Resampler(**sizes), "image_proj")
    return made


def first_stage() -> AutoencoderKL:
    sizes = {
        k: tuple(v) if isinstance(v, list) else v for k, v in FACTS["first_stage_ddconfig"].items()
    }
    return stub(
        AutoencoderKL(
            AutoencoderKL.Config(
                **sizes, embed_dim=FACTS["embed_dim"], num_groups=32, shift=0.0,
                scale_factor=FACTS["params"]["scale_factor"],
            )
        ),
        "first_stage",
    )  # fmt: skip


def system(**settings) -> LatentDiffusion:
    root = Root(backbone=UNet3D.Config(), vae=AutoencoderKL.Config(), trainer=TrainerConfig(),
                schedule=SCHEDULE)  # fmt: skip
    parts = Parts(
        first_stage(), conditioner(**settings), stub(Network(), "unet"), DDPM(SCHEDULE),
        LDMLoss(LDMLoss.Config()), Denoising(Denoising.Config()), DDIM(DDIM.Config()),
        NoGuidance(NoGuidance.Config()),
    )  # fmt: skip
    return LatentDiffusion(Wiring(root, (), (), (), ()), parts, 8)


def video() -> Tensor:
    b, c, t, i, j = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (8, 3, FRAMES, 32, 48)), indexing="ij"
    )
    x = (0.7 * b + 1.3 * c + 0.31 * t + 0.21 * i).sin() * (0.5 * c - 0.17 * j + 0.4 * t * b).cos()
    return x.float()


BATCH = Batch(
    video=video(), captions=FACTS["captions"], ids=FACTS["captions"],
    scalars={"fps": TENSORS["in/fps"], "frame_stride": TENSORS["in/frame_stride"].float()},
)  # fmt: skip
DRAWS = Recorded(
    {
        "posterior": TENSORS["in/posterior_noise"].unflatten(0, (8, FRAMES)).transpose(1, 2),
        "drop": TENSORS["in/random_num"],
        "condition_frame": torch.full((8,), FACTS["cond_frame_index"]),
        "t": TENSORS["in/t"],
        "noise": TENSORS["in/noise"],
    }
)


def conditions_of(whole: LatentDiffusion, drop: dict[str, Tensor] | None = None) -> Conditions:
    z0 = whole.latents(BATCH, DRAWS)
    drop = whole.conditioner.drop(DRAWS) if drop is None else drop
    return whole.conditioner(BATCH, Clip(*z0.shape[1:]), drop, DRAWS, whole.encoder(DRAWS), z0)


# --- the step -------------------------------------------------------------------------------------


def test_latents_equal_the_original():
    near(system().latents(BATCH, DRAWS), TENSORS["out/z"])


def test_conditions_and_their_dropout_equal_the_original():
    cond = conditions_of(system())
    near(torch.cat([cond.context, cond.image_context.flatten(1, 2)], 1), TENSORS["out/c_crossattn"])
    near(cond.concat, TENSORS["out/c_concat_frame"][:, :, None].expand_as(cond.concat))
    assert torch.equal(cond.scalars["fps"], TENSORS["out/fs"].float())


def test_undropped_image_tokens_equal_the_original():
    keep = {name: torch.zeros(8, dtype=torch.bool) for name in ("text", "image")}
    near(
        conditions_of(system(), keep).image_context.flatten(1, 2),
        TENSORS["out/c_crossattn_no_dropout_image_part"],
    )


def test_interpolation_is_conditioned_on_the_first_and_last_frames():
    near(conditions_of(system(interp_mode=True)).concat, TENSORS["out/interp_c_concat"])


def test_noise_and_target_equal_the_original():
    schedule, z, t, eps = DDPM(SCHEDULE), TENSORS["out/z"], TENSORS["in/t"], TENSORS["in/noise"]
    near(schedule.noised(z, eps, t), TENSORS["out/x_noisy"])
    near(schedule.target(z, eps, t), TENSORS["out/v_target"])


def test_a_full_step_has_the_loss_and_gradients_of_the_original():
    whole = system()
    terms = whole.step(BATCH, DRAWS)
    for name in ("loss", "loss_simple", "loss_vlb"):
        assert terms.log[name].item() == pytest.approx(
            FACTS["loss_train"][f"train/{name}"], rel=1e-5
        )
    terms.total.backward()
    norms = {f"diffusion_model.{k}": p.grad.norm() for k, p in whole.backbone.named_parameters()}
    assert norms == pytest.approx(FACTS["grad_l2_unet"], rel=1e-3)
    projection = whole.conditioner.image_proj_model.named_parameters()
    norms = {name: p.grad.norm().item() for name, p in projection}
    # below 1e-6: zero up to rounding
    assert norms == pytest.approx(FACTS["grad_l2_image_proj"], rel=1e-3, abs=1e-6)


# --- sampling -------------------------------------------------------------------------------------


class Record(PlainHooks):
    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def before(self, z_t: Tensor, t: Tensor) -> Tensor:
        self.states.append(z_t)
        return z_t


DDIM_FACTS, DDIM_TENSORS = load("ddim")


@pytest.mark.parametrize("case", list(DDIM_FACTS["cases"]))
def test_sampling_follows_the_recorded_trajectory(case):
    this = DDIM_FACTS["cases"][case]
    kwargs = this["kwargs"]
    scales = {
        "guidance_scale": kwargs.get("unconditional_guidance_scale", 1.0),
        "guidance_rescale": kwargs.get("guidance_rescale", 0.0),
    }
    if "cfg_img" in kwargs:
        guidance = TextImage(TextImage.Config(cfg_img=kwargs["cfg_img"], **scales))
    else:
        guidance = ClassifierFree(ClassifierFree.Config(**scales))
    network = Network()
    network.load_state_dict(filled("dynamicrafter", DDIM_FACTS["weights"]["unet"]))
    contexts = ("context", "uncond_context_img_nonetext", "uncond_context")  # by signals dropped
    passes = [
        (p, Conditions(
            DDIM_TENSORS[f"in/{contexts[len(p.dropped)]}"], concat=DDIM_TENSORS["in/concat"],
            scalars={"fps": DDIM_TENSORS["in/fs"].float()},
        ))
        for p in guidance.passes(("text", "image"))
    ]  # fmt: skip
    spacing = kwargs["timestep_spacing"].removeprefix("uniform_")
    noise = DDIM_TENSORS.get(f"in/{case}/noise", ())
    hooks = Record()
    end = denoise(
        network, DDPM(SCHEDULE), guidance, passes,
        DDIM(DDIM.Config(spacing=spacing, eta=kwargs.get("eta", 0.0), end="first")),
        DDIM_TENSORS["in/x_T"], this["steps"],
        Recorded({f"sampler_noise_{i}": n for i, n in enumerate(noise)}), hooks,
    )  # fmt: skip
    got = torch.stack([*hooks.states[1:], end])
    torch.testing.assert_close(got, DDIM_TENSORS[f"out/{case}/x"], **DDIM_FACTS["tolerance"])


# --- rules of the conditioning --------------------------------------------------------------------


def test_text_image_and_both_are_each_dropped_for_a_twentieth_of_samples():
    r = torch.tensor([0.0, 0.049, 0.051, 0.099, 0.101, 0.149, 0.151, 0.9])
    drop = conditioner().drop(Recorded({"drop": r}))
    assert drop["text"].tolist() == [True] * 4 + [False] * 4
    assert drop["image"].tolist() == [False] * 2 + [True] * 4 + [False] * 2


def test_the_image_of_a_batch_is_encoded_and_repeated_over_all_frames():
    whole, z = system(), torch.randn(8, 4, 1, 4, 6)
    asked = []

    def encode(pixels: Tensor, name: str) -> Tensor:
        asked.append((pixels.shape, name))
        return z

    batch = replace(BATCH, video=None, image=torch.zeros(8, 3, 1, 32, 48))
    cond = whole.conditioner(batch, Clip(4, FRAMES, 4, 6), {}, DRAWS, encode, None)
    assert asked == [((8, 3, 1, 32, 48), "image_posterior")]
    assert torch.equal(cond.concat, z.expand(-1, -1, FRAMES, -1, -1))


def test_a_batch_without_an_image_is_refused():
    grid = Clip(4, FRAMES, 4, 6)
    with pytest.raises(ValueError, match="needs an image, and the batch has none"):
        system().conditioner(replace(BATCH, video=None), grid, {}, DRAWS, None, None)


def test_clips_with_more_frames_than_image_tokens_are_refused():
    with pytest.raises(ValueError, match=f"video_length={FRAMES}: the clip has {FRAMES + 1}"):
        system().conditioner(BATCH, Clip(4, FRAMES + 1, 4, 6), {}, DRAWS, None, None)


def test_wiring_refuses_a_video_length_other_than_the_number_of_frames():
    cfg = DynamiCrafter.Config(video_length=16)
    with pytest.raises(Exception, match="video_length=16, but 9 is needed"):
        cfg.wired(Clip(3, 9, 32, 48), Clip(4, 9, 4, 6))


def test_a_first_stage_that_compresses_time_is_refused():
    with pytest.raises(Exception, match="9 frames become 3 latent frames"):
        DynamiCrafter.Config().offers(Clip(3, 9, 32, 48), Clip(4, 3, 4, 6))


@pytest.mark.parametrize("frames", [1, 5])
def test_each_frame_has_its_own_tokens_for_any_number_of_frames(frames):
    clip = Clip(3, frames, 32, 48)
    grid = Clip(4, frames, 4, 6)
    cfg = DynamiCrafter.Config().wired(clip, grid)
    made = DynamiCrafter(cfg)
    batch = Batch(captions=["a"], ids=["a"], image=torch.zeros(1, 3, 1, 32, 48))
    cond = made(batch, grid, {}, DRAWS, lambda x, name: torch.zeros(1, 4, 1, 4, 6), None)
    slots = cfg.offers(clip, grid)
    assert slots.image_context.frames == frames
    assert cond.image_context.shape == (1, frames, cfg.num_queries, cfg.text_width)
    assert not math.isnan(cond.image_context.sum().item())


# --- the query transformer ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["video", "novideo"])
def test_the_query_transformer_equals_the_original(case):
    facts, tensors = load("resampler")
    made = Resampler(**facts["config"][case])
    made.load_state_dict(filled("dynamicrafter", facts["weights"][case]))
    out = made(tensors["in/x"])
    torch.testing.assert_close(out, tensors[f"out/{case}"], rtol=1e-5, atol=1e-5)
    if case == "video":
        out.pow(3).mean().backward()
        norms = {name: p.grad.norm().item() for name, p in made.named_parameters()}
        assert norms == pytest.approx(facts["grad_l2_of_mean_cube_video"], rel=1e-3, abs=1e-6)
