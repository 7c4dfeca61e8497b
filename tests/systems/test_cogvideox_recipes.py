"""Recipes of the published CogVideoX fine-tuning rows: sizes, numbers, and compatibility."""

import pytest
import torch

from sandbox.config import registry
from sandbox.config.root import GROUPS
from sandbox.config.wiring import Wiring, wire
from sandbox.contracts import Clip, ConfigError
from tests.contract.test_recipes import chosen
from tests.helpers import composed

LATENTS = {"1.0": Clip(16, 13, 60, 90), "1.5": Clip(16, 21, 96, 170)}
ROWS = {  # -> kind, parameters of the network and of the LoRA, precision
    "2b_lora": ("1.0", 1_693_783_872, 58_982_400, "fp16"),
    "2b_sft": ("1.0", 1_693_783_872, 0, "fp16"),
    "5b_lora": ("1.0", 5_570_283_072, 132_120_576, "bf16"),
    "5b_i2v_lora": ("1.0", 5_570_479_680, 132_120_576, "bf16"),
    "5b_sft": ("1.0", 5_570_283_072, 0, "bf16"),
    "1_5_5b_lora": ("1.5", 5_570_676_352, 132_120_576, "bf16"),
    "1_5_5b_i2v_lora": ("1.5", 5_571_594_880, 132_120_576, "bf16"),
    "1_5_5b_sft": ("1.5", 5_570_676_352, 0, "bf16"),
}
OF_THE_USER = {"logger", "resume", "kernels", "adapter", "metric", "reconstruction", "stage",
               "features"}  # fmt: skip


def wired(row: str, *more: str) -> Wiring:
    return wire(composed(f"experiment=cogvideox_{row}", "init_from=released", *more))


@pytest.mark.parametrize("row", ROWS)
def test_it_wires_with_the_published_sizes_and_numbers(row: str) -> None:
    wiring = wired(row)
    kind, _, lora, precision = ROWS[row]
    root, optimizer = wiring.root, wiring.root.optimizer
    assert wiring.latents == (LATENTS[kind],)
    assert wiring.grids[0].frames == {"1.0": 13, "1.5": 22}[kind]
    assert (root.lr, root.seed, root.precision) == (2e-5, 42, precision)
    assert (optimizer.betas, optimizer.weight_decay, optimizer.eps) == ((0.9, 0.95), 1e-4, 1e-8)
    assert root.lr_schedule.factor(99, 5000) == 1 > root.lr_schedule.factor(98, 5000)
    assert (root.trainer.clip, root.trainer.accumulate, root.data.batch_size) == (1.0, 1, 1)
    assert root.backbone.gradient_checkpointing
    assert (root.vae.use_slicing, root.vae.use_tiling) == (True, True)
    assert root.vae.scaling_factor == (1.15258426 if "2b" in row else 0.7)
    assert root.schedule.snr_shift == (3.0 if "2b" in row else 1.0)
    assert (root.adapter is not None) == bool(lora)
    assert root.conditioning.weights == "cached"
    assert root.data.image == ("i2v" in row)


@pytest.mark.parametrize("row", ["2b_lora", "1_5_5b_i2v_lora"])
def test_its_network_and_lora_have_the_published_parameter_counts(row: str) -> None:
    root = wired(row).root
    with torch.device("meta"):
        network = registry.create(root.backbone)
        assert sum(p.numel() for p in network.parameters()) == ROWS[row][1]
        adapter = registry.create(root.adapter)
        adapter.apply(network, root.backbone.adapter_targets(), torch.bfloat16)
    trained = [p for p in network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == ROWS[row][2]
    assert {p.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize("row", ROWS)
def test_it_chooses_every_group(row: str) -> None:
    assert set(GROUPS) - OF_THE_USER <= set(chosen(f"cogvideox_{row}"))


@pytest.mark.parametrize("row", ROWS)
def test_its_cached_latents_are_encoded_with_the_same_recipe(row: str) -> None:
    """The task=encode command in the recipe's comment: same first stage, precision and size."""
    size = "49x480x720" if ROWS[row][0] == "1.0" else "81x768x1360"
    trained = wired(row)
    encoded = wired(row, "task=encode", f"data=cogvideox_folder_{size}", "data.root=clips",
                    "vae.weights=released", "conditioning.weights=released",
                    f"conditioning.dtype={ROWS[row][3]}")  # fmt: skip
    assert encoded.latents == trained.latents
    assert encoded.root.precision == trained.root.precision
    assert encoded.root.conditioning.embeds()
    assert encoded.root.conditioning.encodes() == ("i2v" in row)


def test_lora_needs_the_released_weights() -> None:
    with pytest.raises(ConfigError, match="init_from=FOLDER"):
        wire(composed("experiment=cogvideox_2b_lora"))


# --- tiny siblings --------------------------------------------------------------------------------

ARCHITECTURE = ("use_rotary_positional_embeddings", "use_learned_positional_embeddings",
                "rope_grid", "patch_size_t", "gradient_checkpointing")  # fmt: skip
CONDITIONS = ("image", "image_noise_mean", "image_noise_std", "image_noise_shared", "drop_image",
              "image_latent_scale", "ofs", "drop_text", "masked")  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_its_tiny_sibling_differs_only_in_size_and_data(row: str) -> None:
    full, tiny = wired(row).root, wired(f"{row}_tiny").root
    for group in ("schedule", "loss", "guidance", "optimizer", "lr_schedule", "ema", "trainer",
                  "layout"):  # fmt: skip
        assert getattr(full, group) == getattr(tiny, group), group
    for group in ("vae", "backbone", "conditioning", "sampler", "checkpoint"):
        assert getattr(full, group).plugin == getattr(tiny, group).plugin, group
    assert full.vae.scaling_factor == tiny.vae.scaling_factor
    for name in ARCHITECTURE:
        assert getattr(full.backbone, name) == getattr(tiny.backbone, name), name
    for name in CONDITIONS:
        assert getattr(full.conditioning, name) == getattr(tiny.conditioning, name), name
    assert (full.backbone.ofs_embed_dim is None) == (tiny.backbone.ofs_embed_dim is None)
    assert (full.adapter is None) == (tiny.adapter is None)
    if full.adapter is not None:
        assert full.adapter.alpha / full.adapter.rank == tiny.adapter.alpha / tiny.adapter.rank
    assert tiny.callbacks["samples"].every <= tiny.steps
