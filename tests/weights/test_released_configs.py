"""Components from published configurations, with the published names of their settings."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import compose
from sandbox.config import discovery, registry
from sandbox.contracts import ConfigError, StorageError
from sandbox.weights.released_configs import components
from tests.helpers import preset

discovery.setup()


def file(content: dict[str, Any], folder: Path, name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content) if name.endswith("yaml") else json.dumps(content)
    (folder / name).write_text(text)
    return folder / name


# --- diffusers ------------------------------------------------------------------------------------

BACKBONES = ("cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox_1_5_5b",
             "cogvideox_1_5_5b_i2v")  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_a_transformer_of_each_release(tmp_path, name) -> None:
    want = preset("backbone", name)
    found = components(file(want.diffusers_config(), tmp_path))["backbone"]
    own = {"rope_grid": want.rope_grid, "gradient_checkpointing": want.gradient_checkpointing}
    assert replace(found, **own) == want


SD3 = {
    "_class_name": "SD3Transformer2DModel", "attention_head_dim": 64, "in_channels": 16,
    "caption_projection_dim": 1536, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 24, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192, "sample_size": 128,
}  # fmt: skip


def test_a_transformer_of_stable_diffusion_3(tmp_path) -> None:
    want = preset("backbone", "mmdit_sd3_medium")
    assert components(file(SD3, tmp_path))["backbone"] == want
    large = SD3 | {"num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432,
                   "qk_norm": "rms_norm", "dual_attention_layers": []}  # fmt: skip
    want = preset("backbone", "mmdit_sd3_5_large")
    assert components(file(large, tmp_path))["backbone"] == want
    with pytest.raises(ConfigError, match="dual_attention_layers"):
        components(file(large | {"dual_attention_layers": [0, 1]}, tmp_path))


@pytest.mark.parametrize("name", ["cogvideox_2b", "cogvideox_5b"])
def test_a_first_stage_of_each_release(tmp_path, name) -> None:
    want = preset("vae", name)
    published = want.diffusers_config() | {"invert_scale_latents": True}
    found = components(file(published, tmp_path))["vae"]
    tiles = {
        k: getattr(want, k)
        for k in want.__dataclass_fields__
        if k.startswith(("tile", "use_", "weights"))
    }
    chunks = {k: getattr(want, k) for k in want.__dataclass_fields__ if k.startswith("num_")}
    assert replace(found, **tiles, **chunks) == want


DC_AE = {  # dc-ae-f32c32-sana-1.0-diffusers
    "_class_name": "AutoencoderDC", "attention_head_dim": 32, "decoder_act_fns": "silu",
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3], "decoder_norm_types": "rms_norm",
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "downsample_block_type": "conv",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "in_channels": 3,
    "latent_channels": 32, "scaling_factor": 0.41407, "upsample_block_type": "interpolate",
}  # fmt: skip


def test_a_deep_compression_autoencoder(tmp_path) -> None:
    found = components(file(DC_AE, tmp_path))["vae"]
    assert replace(found, weights="auto") == replace(preset("vae", "dc_ae_f32c32_sana"))
    scales = {"encoder_qkv_multiscales": [[], [], [], [3, 5], [5], [5]]}
    with pytest.raises(ConfigError, match="at most one number per level"):
        components(file(DC_AE | scales, tmp_path))


def test_a_first_stage_of_wan(tmp_path) -> None:
    want = preset("vae", "wan_2_1")
    names = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample",
             "latents_mean", "latents_std")  # fmt: skip
    settings = {n: list(v) if isinstance(v := getattr(want, n), tuple) else v for n in names}
    published = {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0} | settings
    assert components(file(published, tmp_path))["vae"] == want
    second = published | {"is_residual": True, "patch_size": 2}  # Wan 2.2
    with pytest.raises(ConfigError, match="is_residual"):
        components(file(second, tmp_path))


SCHEDULERS = {
    "CogVideoXDDIMScheduler": (
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "snr_shift_scale": 1.0},
        {"zero_terminal_snr": True, "prediction": "v", "snr_shift": 1.0, "betas": (0.00085, 0.012),
         "beta_schedule": "scaled_linear"},
    ),
    "CogVideoXDPMScheduler": ({}, {"snr_shift": 3.0, "prediction": "eps"}),
    "DDPMScheduler": (
        {"beta_start": 0.0001, "beta_end": 0.02, "variance_type": "learned_range"},
        {"betas": (0.0001, 0.02), "learned_variance": True, "beta_schedule": "linear"},
    ),
    "DDIMScheduler": (
        {"num_train_timesteps": 600, "beta_schedule": "squaredcos_cap_v2"},
        {"timesteps": 600, "beta_schedule": "cosine"},
    ),
    "PNDMScheduler": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "skip_prk_steps": True},
        {"beta_schedule": "scaled_linear", "betas": (0.00085, 0.02)},
    ),
    "EulerDiscreteScheduler": ({"prediction_type": "sample"}, {"prediction": "x0"}),
    "DPMSolverMultistepScheduler": ({"beta_end": 0.012}, {"betas": (0.0001, 0.012)}),
    "FlowMatchEulerDiscreteScheduler": ({"shift": 3.0}, {"shift": 3.0, "plugin": "schedule/flow"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusers(tmp_path, name) -> None:
    given, want = SCHEDULERS[name]
    path = file({"_class_name": name, **given}, tmp_path, "scheduler_config.json")
    found = components(path)["schedule"]
    assert {k: getattr(found, k) for k in want} == want


@pytest.mark.parametrize(
    "name",
    [*SCHEDULERS, "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", "HeunDiscreteScheduler"],
)
def test_what_a_file_leaves_out_is_the_default_of_diffusers(tmp_path, name) -> None:
    diffusers = pytest.importorskip("diffusers")
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    full = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    full.pop("lambda_min_clipped", None)  # infinite, which JSON lacks
    short = file({"_class_name": name}, tmp_path / "short")
    assert components(file({"_class_name": name, **full}, tmp_path / "full")) == components(short)


def test_a_pipeline_is_read_from_its_folders(tmp_path) -> None:
    file(preset("backbone", "cogvideox_2b").diffusers_config(), tmp_path / "transformer")
    file(preset("vae", "cogvideox_2b").diffusers_config(), tmp_path / "vae")
    file({"_class_name": "CogVideoXDDIMScheduler"}, tmp_path / "scheduler", "scheduler_config.json")
    sizes = {"d_model": 64, "num_layers": 2, "d_ff": 128, "feed_forward_proj": "gated-gelu",
             "architectures": ["T5EncoderModel"], "tie_word_embeddings": False}  # fmt: skip
    file(sizes, tmp_path / "text_encoder")
    file({"_class_name": "CogVideoXPipeline"}, tmp_path, "model_index.json")
    found = components(tmp_path)
    assert set(found) == {"backbone", "vae", "schedule", "conditioning"}
    assert found["conditioning"].d_model == 64


# --- EasyAnimate ----------------------------------------------------------------------------------

PIXART = {
    "_class_name": "Transformer3DModel", "_diffusers_version": "0.27.2",
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72,
    "attention_type": "default", "caption_channels": 4096, "cross_attention_dim": 1152,
    "double_self_attention": False, "dropout": 0.0, "in_channels": 4, "norm_elementwise_affine":
    False, "norm_eps": 1e-6, "norm_num_groups": 32, "norm_type": "ada_norm_single",
    "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28,
    "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8, "patch_size": 2,
    "sample_size": 64, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
V2 = {
    "transformer_additional_kwargs": {
        "patch_3d": False, "fake_3d": False, "basic_block_type": "motionmodule",
        "time_position_encoding_before_transformer": False, "motion_module_type": "Vanilla",
        "enable_uvit": True,
        "motion_module_kwargs": {
            "num_attention_heads": 8, "num_transformer_block": 1,
            "attention_block_types": ["Temporal_Self", "Temporal_Self"],
            "temporal_position_encoding": True, "temporal_position_encoding_max_len": 4096,
            "temporal_attention_dim_div": 1, "block_size": 1,
        },
    },
    "noise_scheduler_kwargs": {
        "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 1,
    },
}  # fmt: skip


def test_easyanimate_v2_of_its_json_and_its_yaml(tmp_path) -> None:
    paths = file(PIXART, tmp_path), file(V2, tmp_path, "easyanimate_video_motion_module_v2.yaml")
    found = components(*paths)
    want = preset("backbone", "easyanimate_v2")
    own = {"gradient_checkpointing": True, "vector_dim": 0}
    assert replace(found["backbone"], **own) == want
    assert found["schedule"].betas == (0.0001, 0.02)


def test_the_motion_module_of_a_file_without_one_is_the_published_default(tmp_path) -> None:
    assert components(file(PIXART, tmp_path))["backbone"].motion_module == "grid"


@pytest.mark.parametrize(("is_slice", "plugin"), [(True, "vae/slice"), (False, "vae/magvit")])
def test_first_stages_of_easyanimate(tmp_path, is_slice, plugin) -> None:
    spatial, both = "Spatial{}Block3D", "SpatialTemporal{}Block3D"
    published = {
        "_class_name": "AutoencoderKLMagvit", "ch": 128, "ch_mult": [1, 2, 4, 4],
        "block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.1825,
        "slice_compression_vae": is_slice, "mini_batch_encoder": 8 if is_slice else 9,
        "mini_batch_decoder": 2 if is_slice else 3, "mid_block_attention_type": "3d",
        "down_block_types": [s.format("Down") for s in (spatial, both, both, both)],
        "up_block_types": [s.format("Up") for s in (spatial, both, both, both)],
    }  # fmt: skip
    found = components(file(published, tmp_path))["vae"]
    assert (found.plugin, found.scale_factor) == (plugin, 0.18215)
    assert found.mini_batch_encoder == published["mini_batch_encoder"]


# --- latent-diffusion and DynamiCrafter -----------------------------------------------------------

LDM = {"model": {
    "base_learning_rate": 2e-6,
    "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "params": {
        "linear_start": 0.0015, "linear_end": 0.0195, "num_timesteps_cond": 1, "log_every_t": 200,
        "timesteps": 1000, "first_stage_key": "image", "image_size": 64, "channels": 3,
        "monitor": "val/loss_simple_ema",
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 224,
                "attention_resolutions": [8, 4, 2], "num_res_blocks": 2,
                "channel_mult": [1, 2, 3, 4], "num_head_channels": 32,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.VQModelInterface",
            "params": {
                "embed_dim": 3, "n_embed": 8192, "ckpt_path": "vq-f4/model.ckpt",
                "ddconfig": {
                    "double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3,
                    "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4], "num_res_blocks": 2,
                    "attn_resolutions": [], "dropout": 0.0,
                },
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": "__is_unconditional__",
    },
}}  # fmt: skip
CRAFTER = {"model": {
    "base_learning_rate": 1e-5, "scale_lr": False,
    "target": "lvdm.models.ddpm3d.LatentVisualDiffusion",
    "params": {
        "rescale_betas_zero_snr": True, "parameterization": "v", "linear_start": 0.00085,
        "linear_end": 0.012, "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000,
        "first_stage_key": "video", "cond_stage_key": "caption", "cond_stage_trainable": False,
        "image_proj_model_trainable": True, "conditioning_key": "hybrid", "image_size": [40, 64],
        "channels": 4, "scale_by_std": False, "scale_factor": 0.18215, "use_ema": False,
        "uncond_prob": 0.05, "uncond_type": "empty_seq", "rand_cond_frame": True,
        "use_dynamic_rescale": True, "base_scale": 0.7, "fps_condition_type": "fps",
        "perframe_ae": True,
        "unet_config": {
            "target": "lvdm.modules.networks.openaimodel3d.UNetModel",
            "params": {
                "in_channels": 8, "out_channels": 4, "model_channels": 320,
                "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
                "channel_mult": [1, 2, 4, 4], "dropout": 0.1, "num_head_channels": 64,
                "transformer_depth": 1, "context_dim": 1024, "use_linear": True,
                "use_checkpoint": True, "temporal_conv": True, "temporal_attention": True,
                "temporal_selfatt_only": True, "use_relative_position": False,
                "use_causal_attention": False, "temporal_length": 16, "addition_attention": True,
                "image_cross_attention": True, "default_fs": 10, "fs_condition": True,
            },
        },
        "first_stage_config": {
            "target": "lvdm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4, "monitor": "val/rec_loss",
                "ddconfig": {
                    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3,
                    "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
                    "attn_resolutions": [], "dropout": 0.0,
                },
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {
            "target": "lvdm.modules.encoders.condition.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        },
        "img_cond_stage_config": {
            "target": "lvdm.modules.encoders.condition.FrozenOpenCLIPImageEmbedderV2",
            "params": {"freeze": True},
        },
        "image_proj_stage_config": {
            "target": "lvdm.modules.encoders.resampler.Resampler",
            "params": {
                "dim": 1024, "depth": 4, "dim_head": 64, "heads": 12, "num_queries": 16,
                "embedding_dim": 1280, "output_dim": 1024, "ff_mult": 4, "video_length": 16,
            },
        },
    },
}}  # fmt: skip


@pytest.mark.parametrize(
    ("published", "recipe"), [(LDM, "ldm_celebahq_vq4"), (CRAFTER, "dynamicrafter_512")]
)
def test_a_yaml_gives_the_components_of_its_recipe(tmp_path, published, recipe) -> None:
    found = components(file(published, tmp_path, "config.yaml"))
    more = ("init_from=null", "conditioning.weights=random") if published is CRAFTER else ()
    want = compose(f"experiment={recipe}", "data.root=.", "vae.weights=null", *more)
    ours = {  # settings of this project, and those that the wiring fills
        "backbone": ("context_dim", "adm_in_channels", "motion_block_size", "motion_heads"),
        "vae": ("weights", "train_frames", "frames_per_pass"),
        "schedule": (),
        "loss": (),
    }
    if published is CRAFTER:
        ours["conditioning"] = ("weights",)
    for group, names in ours.items():
        same = {
            name: getattr(getattr(want, group), name)
            for name in names
            if hasattr(found[group], name)
        }
        assert replace(found[group], **same) == getattr(want, group), group


# --- errors ---------------------------------------------------------------------------------------

NOISE = {"_class_name": "DDIMScheduler"}
WRONG = {
    "an unknown setting": (NOISE | {"magic": 3}, r"DDIMScheduler.magic=3: has no counterpart"),
    "an unknown value": (NOISE | {"prediction_type": "flow"}, r"prediction_type=flow: want one of"),
    "another beta schedule": (NOISE | {"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid: want"),
    "betas of its own": (NOISE | {"trained_betas": [0.1]}, r"trained_betas=\[0.1\]: want None"),
    "a bad number": (NOISE | {"beta_start": 2.0}, r"schedule.betas"),
    "a wrong type": (NOISE | {"num_train_timesteps": "many"}, r"schedule.timesteps"),
    "another activation": (
        {"_class_name": "CogVideoXTransformer3DModel", "activation_fn": "geglu"},
        "activation_fn=geglu: want gelu-approximate, the only one supported",
    ),
    "another class": ({"_class_name": "WanTransformer3DModel"}, r"\(WanTransformer3DModel\); want"),
    "no class": ({"a": 1}, r"no component that is known here \(no class is named\)"),
    "other blocks": (
        {"_class_name": "AutoencoderKLCogVideoX", "down_block_types": ["A", "B"]}, "block_types",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_counterpart_is_an_error(tmp_path, name) -> None:
    content, want = WRONG[name]
    with pytest.raises(ConfigError, match=want):
        components(file(content, tmp_path))


BROKEN = {
    "HTML": "<!DOCTYPE html>", "a list": "[1]", "cut short": '{"a": ', "deep": "[" * 100_000,
    "empty": "", "large": " " * 1_100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, suffix) -> None:
    if name == "deep" and suffix == "yaml":
        pytest.skip("the parser of YAML is slow here")
    (tmp_path / f"config.{suffix}").write_text(BROKEN[name])
    with pytest.raises(StorageError, match=r"no configuration|cannot be read as a configuration"):
        components(tmp_path / f"config.{suffix}")


def test_missing_paths_are_named(tmp_path) -> None:
    with pytest.raises(StorageError, match="no such file or folder"):
        components(tmp_path / "none")
    with pytest.raises(StorageError, match=r"want a folder with config\.json"):
        components(tmp_path)


def test_every_entry_of_the_tables_names_a_setting() -> None:
    """A renamed setting of a plugin must be renamed in the tables, too."""
    for plugin in registry.plugins("layout"):
        layout: Any = registry.default("layout", plugin.name)
        for row in (row for rows in layout.published_classes().values() for row in rows):
            if row.plugin.endswith("/*"):
                continue
            known = set(registry.find(row.plugin).config.__dataclass_fields__)
            ours = {n.partition(".")[0].removesuffix("#") for n in row.names.values()}
            assert ours | set(row.sets) <= known, row.plugin
            others = {*row.names, *row.fixed, *row.ignored}
            assert {k for k in row.defaults if k not in others} <= known, row.plugin


def test_a_component_is_built_from_a_released_configuration(tmp_path) -> None:
    from sandbox import components as public

    path = file(NOISE | {"num_train_timesteps": 600}, tmp_path, "scheduler_config.json")
    schedule = registry.create(public(path)["schedule"])
    assert schedule.cfg.timesteps == 600


def test_the_command_prints_a_recipe(tmp_path, capsys) -> None:
    from sandbox.tasks.plugins import print_published

    path = file(NOISE | {"beta_end": 0.012}, tmp_path, "scheduler_config.json")
    assert list(print_published(path)["components"]) == ["schedule=ddpm"]
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert recipe["defaults"] == [{"override /schedule": "ddpm"}]
    assert recipe["schedule"]["betas"] == [0.0001, 0.012]
