"""A diffusers pipeline folder, trained here and exported: diffusers loads it, with equal videos."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sandbox import compose
from sandbox.cli.jobs import perform
from sandbox.config.root import to_container
from sandbox.config.wiring import wire
from sandbox.distributed.rank import Rank
from sandbox.evaluation.evaluate import slice_batch
from sandbox.evaluation.prompts import data_batch
from sandbox.tasks.train import train as train_task
from sandbox.training.build import load_system
from tests.helpers import composed, words
from tests.plugins.conditioning.test_t5 import write_tokenizer

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.slow

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "out_channels": 4, "patch_size": 2,
    "time_embed_dim": 24, "num_layers": 2, "sample_height": 8, "sample_width": 8,
    "sample_frames": 9,
}  # fmt: skip
KINDS = {  # settings that differ from 2b, and the pipeline class
    "t2v": ({"in_channels": 4}, diffusers.CogVideoXPipeline),
    "i2v": (
        {"in_channels": 8, "patch_size_t": 2, "ofs_embed_dim": 24,
         "use_rotary_positional_embeddings": True},
        diffusers.CogVideoXImageToVideoPipeline,
    ),
}  # fmt: skip
NOISE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True, "timestep_spacing": "trailing", "snr_shift_scale": 3.0,
}  # fmt: skip
NEAR = {"atol": 1e-4, "rtol": 1e-4}
NO_TEXT = {"tokenizer": None, "text_encoder": None}
LORA = ("adapter=lora", "adapter.rank=4", "adapter.alpha=2")


def pipeline(kind: str) -> Any:
    """A tiny diffusers pipeline whose first stage has almost no posterior noise."""
    torch.manual_seed(0)
    sizes, of = KINDS[kind]
    network = diffusers.CogVideoXTransformer3DModel(
        **SIZES, **sizes, text_embed_dim=20, max_text_seq_length=6
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        sample_height=64, sample_width=64, scaling_factor=0.7, invert_scale_latents=kind == "i2v",
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    with torch.no_grad():
        vae.encoder.conv_out.conv.weight[4:] = 0
        vae.encoder.conv_out.conv.bias[4:] = -30
    scheduler = diffusers.CogVideoXDDIMScheduler(**NOISE)
    text = text_encoder() if kind == "t2v" else NO_TEXT
    return of(**text, vae=vae, transformer=network, scheduler=scheduler)


def text_encoder() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    cfg = transformers.T5Config(
        vocab_size=16, d_model=20, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokens = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return {"text_encoder": transformers.T5EncoderModel(cfg).eval(), "tokenizer": tokens}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The pipelines, saved by diffusers."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, place in found.items():
        pipeline(kind).save_pretrained(place, max_shard_size="100KB")
    return found


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> str:
    """A few moving digits as videos."""
    words = ("task.count=4", "data.width=64", "data.height=64", "backbone=cogvideox")
    root = wire(composed("task=clips", f"task.to={tmp_path_factory.mktemp('clips')}", *words)).root
    return perform(root)["folder"]


def trained(kind: str, start: Path, clips: str, out: Path, *more: str) -> Path:
    """Run folder after two training steps from the weights of a pipeline."""
    text = {"weights": start, "vocab_size": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    text = {f"conditioning.{k}={v}" for k, v in text.items()} if kind == "t2v" else ()
    settings = SIZES | {k: v for k, v in KINDS[kind][0].items() if k != "in_channels"}
    image = ("conditioning.image=first_frame", f"conditioning.image_latent_scale={0.7**-2}",
             "conditioning.ofs=2.0") if kind == "i2v" else ()  # fmt: skip
    if "use_rotary_positional_embeddings" not in settings:
        settings["use_rotary_positional_embeddings"] = False
    root = composed(
        "data=cogvideox_folder", f"data.root={clips}", "data.val_fraction=0.3",
        "data.frames=9", "data.height=64", "data.width=64", "data.batch_size=1", "kernels=eager",
        "vae=cogvideox", "vae.block_out_channels=[4,4,8,8]", "vae.latent_channels=4",
        "vae.norm_num_groups=2", "vae.scaling_factor=0.7", f"vae.weights={start}", "logger=null",
        "vae.sample_height=64", "vae.sample_width=64", "backbone=cogvideox",
        *(f"backbone.{k}={v}" for k, v in settings.items()),
        "conditioning=t5", "conditioning.d_model=20", "conditioning.length=6", *image, *text,
        "conditioning.drop_text=0",
        *words("cogvideox_2b_sft_tiny", "schedule", "guidance"), "sampler=ddim", "sampler.steps=3",
        "sampler.spacing=trailing", "sampler.landing=stride", "ema=none",
        "layout=diffusers", f"init_from={start}", f"out={out}",
        "steps=2", "lr=5e-2", "lr_schedule=constant", "lr_schedule.warmup=0", "task.score_clips=1",
        "task.samples=1", "task.untrained=false", "trainer.threads=1", *more,
    )  # fmt: skip
    root = wire(root).root
    done = train_task({"root": to_container(root), "overrides": [], "group": None}, Rank())
    return Path(done["folder"])


@torch.no_grad()
def compared(run: Path, pipe: Any) -> tuple[Tensor, Tensor]:
    """Our clip of a run, and a pipeline's clip for the same noise, text and image."""
    system = load_system(run, "live")
    batch = slice_batch(data_batch(system.root, (), 1), 0, 1)
    grid = system.wiring.grids[0]
    size = (1, grid.channels, grid.frames, grid.height, grid.width)
    text = {"prompt": batch.captions, "max_sequence_length": 6}
    if pipe.text_encoder is None:
        texts = [system.conditioner.encoded([c])[0] for c in (*batch.captions, "")]
        text = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    image = {} if batch.image is None else {"image": batch.image[:, :, 0] / 2 + 0.5}
    theirs = pipe(
        **image, **text, height=64, width=64,
        num_frames=9, num_inference_steps=3, guidance_scale=6.0, output_type="pt",
        latents=system.draws(batch).normal("start", torch.empty(size)).transpose(1, 2),
    ).frames  # fmt: skip
    return system.sample(batch), theirs.transpose(1, 2) * 2 - 1


def exported(run: Path, to: Path, *more: str) -> Path:
    perform(compose("task=export", f"run={run}", "format=diffusers", f"to={to}", *more))
    return to


@pytest.mark.parametrize(
    ("kind", "more"), [("t2v", ()), ("t2v", LORA), ("i2v", LORA)], ids=["sft", "lora", "i2v_lora"]
)
def test_diffusers_loads_an_exported_folder_and_makes_the_same_videos(
    folders, clips, tmp_path, kind, more
) -> None:
    run = trained(kind, folders[kind], clips, tmp_path, *more)
    to = exported(run, tmp_path / "to", "task.shard_mb=1")
    loaded = KINDS[kind][1].from_pretrained(to, **({} if kind == "t2v" else NO_TEXT))
    assert type(loaded).__name__ == json.loads((to / "model_index.json").read_text())["_class_name"]
    ours, theirs = compared(run, loaded)
    torch.testing.assert_close(theirs, ours, **NEAR)
    before = compared(run, pipeline(kind))[1]
    assert (before - ours).abs().max() > 1e-3  # training changed the output
    if more:  # the LoRA alone, on the released weights
        released = pipeline(kind)
        released.load_lora_weights(run)
        torch.testing.assert_close(compared(run, released)[1], ours, **NEAR)
