"""The VQ autoencoder against recorded outputs of the original, its size and its contract."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plugins.vae.vq import Codebook, VQModel
from sandbox.contracts import Clip, SizeError
from sandbox.data.randomness import Keyed

GOLDEN = Path(__file__).parents[2] / "golden/ldm"
CLIP = (2, 3, 5, 16, 24)
# The published size (CelebAHQ-LDM-VQ-4), which conf/vae/vq_f4.yaml must equal.
VQ_F4 = VQModel.Config(
    embed_dim=3,
    n_embed=8192,
    ch=128,
    ch_mult=(1, 2, 4),
    num_res_blocks=2,
    resolution=256,
    z_channels=3,
    num_groups=32,
    scale_factor=1.0,
    shift=0.0,
)


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((GOLDEN / "vq.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    loaded = load_file(GOLDEN / "vq.safetensors")
    return {k: v[:, :, None] if v.dim() == 4 else v for k, v in loaded.items()}


@pytest.fixture(scope="module")
def model(facts) -> VQModel:
    sizes = {
        k: tuple(v) if isinstance(v, list) else v for k, v in facts["config"]["ddconfig"].items()
    }
    cfg = VQModel.Config(
        **sizes, embed_dim=3, n_embed=32, num_groups=32, scale_factor=1.0, shift=0.0
    )
    table = load_file(GOLDEN / "weights_table.safetensors")["table"]
    state = {}
    for key, (shape, offset, scale, shift) in facts["weights"].items():
        index = (offset + torch.arange(torch.Size(shape).numel())) % len(table)
        state[key] = (table[index] * scale + shift).view(shape)
    model = VQModel(cfg)
    model.load_state_dict(state)
    return model.eval()


def near(name: str, got: Tensor, want: Tensor, rtol: float = 2e-5) -> None:
    """Reruns of the original differ by about 2e-6, other orders of summation by a bit more."""
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert got.shape == want.shape and error < rtol, f"{name}: relative error {error:.1e}"


def test_latents_are_the_features_before_quantisation(model, tensors) -> None:
    near("h", model.encode(tensors["in/x"]).mean, tensors["out/h"])


def test_codes_and_entries_equal_the_original(model, tensors) -> None:
    quantised, _, codes = model.quantize(tensors["out/h"])
    assert torch.equal(codes.flatten(), tensors["out/indices"])
    assert torch.equal(codes[:, 0], tensors["out/indices_bhw"])
    near("quant", quantised, tensors["out/quant"])
    near("codebook_entry", model.quantize.lookup(codes), tensors["out/codebook_entry"])


@pytest.mark.parametrize("legacy", [True, False])
def test_codebook_loss_equals_the_original(model, facts, tensors, legacy) -> None:
    codebook = Codebook(32, 3, beta=0.25, legacy=legacy)
    codebook.load_state_dict(model.quantize.state_dict())
    loss = codebook(tensors["out/h"])[1].mean().item()
    assert loss == pytest.approx(
        facts["emb_loss_legacy" if legacy else "emb_loss_not_legacy"], rel=1e-5
    )


def test_decode_quantises(model, tensors) -> None:
    near("dec", model.decode(tensors["out/h"]), tensors["out/dec"])


def test_decode_can_skip_quantisation(model, tensors) -> None:
    plain = VQModel(replace(model.cfg, force_not_quantize=True))
    plain.load_state_dict(model.state_dict())
    near("dec_not_quantized", plain.decode(tensors["out/h"]), tensors["out/dec_not_quantized"])


def test_gradients_at_the_codebook_equal_the_original(model, tensors) -> None:
    h = tensors["out/h"].clone().requires_grad_()
    quantised, loss, _ = model.quantize(h)
    model.zero_grad()
    (quantised.square().mean() + loss.mean()).backward()
    near("grad_h", h.grad, tensors["out/grad_h"])
    near("grad_codebook", model.quantize.embedding.weight.grad, tensors["out/grad_codebook"])


def test_training_gradients_equal_the_original(model, facts, tensors) -> None:
    out = model.reconstruct(tensors["in/x"], Keyed(0, 0, torch.arange(2), 2))
    model.zero_grad()
    (out.video.square().mean() + out.codebook_loss.mean()).backward()
    for name, p in model.named_parameters():
        want, got = facts["grad_check"]["grad_l2"][name], p.grad.norm().item()
        # below 1e-6: zero up to rounding
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6), name


def test_beta_weights_the_commitment_unless_legacy() -> None:
    z = torch.ones(1, 2, 1, 1, 1)
    for legacy, grad_z, grad_code in [(True, 1.0, -0.25), (False, 0.25, -1.0)]:
        codebook = Codebook(1, 2, beta=0.25, legacy=legacy)
        torch.nn.init.zeros_(codebook.embedding.weight)
        features = z.clone().requires_grad_()
        codebook(features)[1].sum().backward()
        assert features.grad.flatten().tolist() == [grad_z] * 2
        assert codebook.embedding.weight.grad.flatten().tolist() == [grad_code] * 2


def test_codes_do_not_depend_on_autocast() -> None:
    torch.manual_seed(0)
    codebook, z = Codebook(256, 4, 0.25, True), torch.randn(2, 4, 3, 8, 8) / 256
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = codebook.nearest(z)
    assert torch.equal(mixed, codebook.nearest(z))


def test_training_logs_the_share_of_codes_in_use() -> None:
    torch.manual_seed(0)
    model = VQModel(VQModel.Config(n_embed=8))
    out = model.reconstruct(torch.randn(CLIP), Keyed(0, 0, torch.arange(2), 2))
    used = model.quantize.nearest(out.posterior.mean).unique().numel() / 8
    assert out.log["codes_used"].item() == used


def test_published_size_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        state = VQModel(VQ_F4).state_dict()
    want = json.loads((GOLDEN / "vq_f4_keys.json").read_text())
    assert {k: list(v.shape) for k, v in state.items()} == want
    assert sum(v.numel() for v in state.values()) == 55_322_782


def test_preset_is_the_published_size() -> None:
    from omegaconf import OmegaConf

    from sandbox.config.registry import tuples

    preset = OmegaConf.load(Path(__file__).parents[3] / "conf/vae/vq_f4.yaml")
    del preset["defaults"]
    schema = OmegaConf.structured(VQModel.Config)
    assert tuples(OmegaConf.to_object(OmegaConf.merge(schema, preset))) == VQ_F4


def test_latents_have_the_size_that_the_config_promises() -> None:
    cfg = VQModel.Config()
    z = VQModel(cfg).encode(torch.zeros(CLIP)).mean
    assert Clip(*z.shape[1:]) == cfg.latents(Clip(*CLIP[1:]))


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SizeError, match="width=18: want a multiple of 4"):
        VQModel.Config().latents(Clip(3, 1, 16, 18))


def test_every_bad_setting_is_reported() -> None:
    cfg = VQModel.Config(
        n_embed=0, beta=float("nan"), double_z=True, ch_mult=(), dropout=1.0, in_channels=1
    )
    reported = {p.split("=")[0] for p in cfg.problems()}
    assert reported == {"n_embed", "beta", "double_z", "ch_mult", "dropout", "in_channels"}


def test_bfloat16_runs() -> None:
    model = VQModel(VQModel.Config()).bfloat16()
    out = model.reconstruct(
        torch.zeros(CLIP, dtype=torch.bfloat16), Keyed(0, 0, torch.arange(2), 2)
    )
    assert out.video.dtype == torch.bfloat16 and out.video.shape == out.target.shape
