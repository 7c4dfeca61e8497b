"""The full tiny EasyAnimateV2 pipeline: first stages, three stages, a LoRA, and samples.

Each step is a command line of its recipes and starts from the run of the previous step. About a
minute of CPU time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sandbox.cli.main import main
from sandbox.runs.run import Run
from sandbox.storage import checkpoint

pytestmark = pytest.mark.slow
STAGES = ("stage1", "stage2", "stage3", "lora")


def command(*words: str) -> None:
    """Runs a command line to its end."""
    with pytest.raises(SystemExit) as left:
        main([*words])
    assert left.value.code == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Run folders by recipe, each initialised from the previous one."""
    out = tmp_path_factory.mktemp("pipeline")
    said = (f"out={out}", f"cache={out}/cache", "logger=null", "trainer.threads=1")

    def run(name: str, *words: str) -> Path:
        command(f"experiment=easyanimate_v2_{name}_tiny", *said, *words)
        (config,) = out.glob(f"easyanimate_v2_{name}_tiny-*/config.yaml")
        return config.parent

    found = {"vae_magvit": run("vae_magvit")}
    found["vae_slice"] = run("vae_slice", f"init_from={found['vae_magvit']}", "steps=12")
    slices = f"init_from={found['vae_slice']}"
    found["vae_slice_decoder"] = run("vae_slice_decoder", slices, "steps=12")
    before = "null"
    for stage in STAGES:
        words = f"vae.weights={found['vae_magvit']}", f"init_from={before}"
        found[stage] = run(stage, *words)
        before = str(found[stage])
    words = ["task=sample", "task.save_fps=24", f"run={found['lora']}"]
    command(*words, "prompts=[a red 3 moving left]")
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    return checkpoint.load(newest)["weights"]


def logged(folder: Path, name: str) -> list[float]:
    return [row[name] for row in Run(folder).metrics().values() if name in row]


def changed(folders: dict[str, Path], stage: str, before: str) -> set[str]:
    old, new = weights(folders[before]), weights(folders[stage])
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_each_stage_trains_only_its_own_parameters(folders):
    motion = changed(folders, "stage2", "stage1")
    assert motion and all(".attn_temporal." in name for name in motion)
    parts = ("transformer_blocks", "proj_out", "pos_embed", "long_connect_fc")
    last = changed(folders, "stage3", "stage2")
    assert last and all(any(part in name for part in parts) for name in last)
    first = weights(folders["stage1"])
    starts = [v for k, v in first.items() if k.endswith("temporal_transformer.proj_out.weight")]
    assert starts and not any(w.any() for w in starts)  # trained in stage 2 only


def test_a_decoder_is_trained_with_a_frozen_encoder(folders):
    before, after = (
        load_file(folders[name] / "first_stage.safetensors")
        for name in ("vae_slice", "vae_slice_decoder")
    )
    differing = {k for k in before if not torch.equal(before[k], after[k])} - {"scale", "shift"}
    assert differing and all(k.startswith(("decoder", "post_quant_conv")) for k in differing)


def test_a_first_stage_and_the_stages_of_a_transformer_learn(folders):
    psnr = logged(folders["vae_magvit"], "psnr")  # before and after its discriminators start
    assert sum(psnr[40:50]) > sum(psnr[:10]) + 5
    assert logged(folders["vae_magvit"], "disc_loss")[-1] > 0
    for stage in ("stage1", "stage2"):
        losses = logged(folders[stage], "loss")
        assert sum(losses[-10:]) < sum(losses[:10]), stage


def test_the_last_run_writes_a_lora_in_the_published_layout_and_clips(folders):
    lora = load_file(folders["lora"] / "lora_kohya.safetensors")
    down = "lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert lora[down].shape[0] == 4
    assert {k.rpartition(".")[0] for k in lora if k.endswith(".alpha")}
    assert [*(folders["lora"] / "samples/prompts").glob("000-*.mp4")]
