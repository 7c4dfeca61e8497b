"""Folders of diffusers pipelines: transformer/, vae/ and text_encoder/, one model each."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from plugins._blocks.state_dicts import log_once
from sandbox.contracts import ConfigError, LayoutConfig, PluginConfig, ReleasedClass, State
from sandbox.registry import register

# Folder -> our component, and the prefix of its names there.
FOLDERS = {
    "transformer": ("backbone", ""),
    "vae": ("vae", ""),
    "text_encoder": ("conditioning", "encoder."),
}
EMA = "_ema"  # ends the name of a folder with EMA weights
PIPELINES = {  # by network: text-to-video, image-to-video
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
}
VERSION = "0.32.0"  # the first that has all of these classes
FILES = {"scheduler": "scheduler_config.json", "transformer": "config.json", "vae": "config.json"}
TEXT = {
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
}

# --- settings -------------------------------------------------------------------------------------

COGVIDEOX = ReleasedClass(
    "backbone/cogvideox",
    fixed={
        "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0,
        "flip_sin_to_cos": True, "freq_shift": 0, "norm_elementwise_affine": True,
        "timestep_activation_fn": "silu",
    },
    ignored=("patch_bias",),  # as released: false, although the weights have a bias
    defaults={
        "num_attention_heads": 30, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
        "time_embed_dim": 512, "ofs_embed_dim": None, "text_embed_dim": 4096, "num_layers": 30,
        "sample_width": 90, "sample_height": 60, "sample_frames": 49, "patch_size": 2,
        "patch_size_t": None, "temporal_compression_ratio": 4, "max_text_seq_length": 226,
        "norm_eps": 1e-5, "spatial_interpolation_scale": 1.875,
        "temporal_interpolation_scale": 1.0, "use_rotary_positional_embeddings": False,
        "use_learned_positional_embeddings": False,
    },
    sets={"vector_dim": 0},
)  # fmt: skip
COGVIDEOX_VAE = ReleasedClass(
    "vae/cogvideox",
    fixed={
        "in_channels": 3, "out_channels": 3, "down_block_types": "CogVideoXDownBlock3D",
        "up_block_types": "CogVideoXUpBlock3D", "act_fn": "silu", "norm_eps": 1e-6,
        "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    ignored=("force_upcast", "invert_scale_latents"),  # the latter: conditioning.image_latent_scale
    defaults={
        "block_out_channels": [128, 256, 256, 512], "latent_channels": 16, "layers_per_block": 3,
        "norm_num_groups": 32, "temporal_compression_ratio": 4, "sample_height": 480,
        "sample_width": 720, "scaling_factor": 1.15258426,
    },
)  # fmt: skip
SD3 = ReleasedClass(
    "backbone/mmdit",
    values={"qk_norm": {None: "none", "rms_norm": "rms_norm", "layer_norm": "layer_norm"}},
    fixed={"dual_attention_layers": []},
    ignored=("caption_projection_dim",),  # the width
    defaults={
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18,
        "attention_head_dim": 64, "num_attention_heads": 18, "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96,
        "qk_norm": None,
    },
    sets={"rope": False, "register_tokens": 0, "time_features": 256},
)  # fmt: skip
DC_AE = ReleasedClass(
    "vae/dc_ae",
    fixed={"in_channels": 3, "encoder_out_shortcut": True, "decoder_in_shortcut": True,
           "decoder_conv_act_fn": "relu"},
    single=("encoder_qkv_multiscales", "decoder_qkv_multiscales"),
    defaults={
        "latent_channels": 32, "attention_head_dim": 32, "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock", "upsample_block_type": "pixel_shuffle",
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_act_fns": "silu",
        "decoder_layers_per_block": [3, 3, 3, 3, 3, 3], "decoder_norm_types": "rms_norm",
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "downsample_block_type": "pixel_unshuffle", "scaling_factor": 1.0,
    },
)  # fmt: skip
WAN_VAE = ReleasedClass(
    "vae/wan",
    fixed={"decoder_base_dim": None, "attn_scales": [], "dropout": 0.0, "is_residual": False,
           "in_channels": 3, "out_channels": 3, "patch_size": None},
    ignored=("scale_factor_temporal", "scale_factor_spatial"),  # those of dim_mult
    defaults={
        "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "latents_mean": [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921],
        "latents_std": [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160],
    },
    sets={"latent_frames_per_pass": 1},
)  # fmt: skip
OF_SAMPLERS = (  # settings of a scheduler that a sampler has here
    "set_alpha_to_one", "steps_offset", "clip_sample", "clip_sample_range", "sample_max_value",
    "timestep_spacing", "thresholding", "dynamic_thresholding_ratio", "skip_prk_steps",
    "interpolation_type", "sigma_min", "sigma_max", "timestep_type", "final_sigmas_type",
    "solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final",
    "lambda_min_clipped", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
    "use_lu_lambdas", "flow_shift", "time_shift_type",
)  # fmt: skip
DISCRETE = ReleasedClass(
    "schedule/ddpm",
    names={
        "num_train_timesteps": "timesteps", "beta_start": "betas.0", "beta_end": "betas.1",
        "prediction_type": "prediction", "rescale_betas_zero_snr": "zero_terminal_snr",
        "snr_shift_scale": "snr_shift", "variance_type": "learned_variance",
    },
    values={
        "prediction_type": {"epsilon": "eps", "v_prediction": "v", "sample": "x0"},
        "beta_schedule": {"linear": "linear", "scaled_linear": "scaled_linear",
                          "squaredcos_cap_v2": "cosine"},
        "variance_type": {"fixed_small": False, "fixed_small_log": False, "fixed_large": False,
                          "learned_range": True, None: False},
    },
    fixed={"trained_betas": None, "use_flow_sigmas": False, "use_dynamic_shifting": False},
    ignored=OF_SAMPLERS,
    defaults={"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
              "beta_schedule": "linear", "prediction_type": "epsilon"},
)  # fmt: skip
COGVIDEOX_NOISE = replace(
    DISCRETE,
    defaults={
        **DISCRETE.defaults, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "snr_shift_scale": 3.0,
    },
)  # fmt: skip
EASYANIMATE = ReleasedClass(
    "backbone/easyanimate",
    names={
        "motion_module_type": "motion_module",
        **{f"motion_module_kwargs.{theirs}": ours for theirs, ours in (
            ("block_size", "motion_block_size"), ("num_attention_heads", "motion_heads"),
            ("num_transformer_block", "motion_depth"),
            ("attention_block_types", "motion_attentions#"),
            ("temporal_attention_dim_div", "motion_dim_div"),
            ("temporal_position_encoding", "motion_positions"),
            ("temporal_position_encoding_max_len", "motion_max_frames"),
        )},
    },
    values={"motion_module_type": {"Vanilla": "vanilla", "VanillaGrid": "grid"}},
    fixed={
        "activation_fn": "gelu-approximate", "dropout": 0.0, "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000, "patch_3d": False,
        "fake_3d": False, "basic_block_type": "motionmodule", "double_self_attention": False,
        "time_position_encoding_before_transformer": False, "only_cross_attention": False,
        "num_vector_embeds": None, "use_linear_projection": False, "upcast_attention": False,
    },
    ignored=(
        "cross_attention_dim", "attention_type", "norm_num_groups", "casual_3d",
        "casual_3d_upsampler_index", "motion_module_kwargs.zero_initialize", "qk_norm",
        "use_additional_conditions", "interpolation_scale",
    ),
)  # fmt: skip
EASYANIMATE_VAE = ReleasedClass(
    "vae/magvit",
    names={"num_attention_heads": "mid_block_num_attention_heads"},
    fixed={
        "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_eps": 1e-6, "double_z": True,
        "use_gc_blocks": False, "spatial_group_norm": False, "cache_compression_vae": False,
    },
    ignored=(
        "scaling_factor",  # as published: a literal 0.18215 is used, whatever the file says
        "block_out_channels", "force_upcast", "enable_magvit", "use_tiling_encoder", "sample_size",
        "use_tiling_decoder", "latents_mean", "latents_std",
    ),
    defaults={"ch": 128, "ch_mult": [1, 2, 4, 4], "layers_per_block": 2, "latent_channels": 4,
              "norm_num_groups": 32, "mini_batch_encoder": 9, "mini_batch_decoder": 3},
    sets={"scale_factor": 0.18215, "shift": 0.0, "start": "published"},
    variants=("slice_compression_vae", {True: "vae/slice", False: "vae/magvit"}),
)  # fmt: skip
T5 = ReleasedClass("conditioning/t5", fixed={"feed_forward_proj": "gated-gelu"}, rest_ignored=True)
FLOW = ReleasedClass(
    "schedule/flow",
    fixed={"num_train_timesteps": 1000, "use_dynamic_shifting": False, "invert_sigmas": False,
           "shift_terminal": None, "stochastic_sampling": False},
    ignored=(*OF_SAMPLERS, "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
)  # fmt: skip
RELEASED = {
    "CogVideoXTransformer3DModel": (COGVIDEOX,),
    "AutoencoderKLCogVideoX": (COGVIDEOX_VAE,),
    "SD3Transformer2DModel": (SD3,),
    "AutoencoderDC": (DC_AE,),
    "AutoencoderKLWan": (WAN_VAE,),
    "CogVideoXDDIMScheduler": (COGVIDEOX_NOISE,),
    "CogVideoXDPMScheduler": (COGVIDEOX_NOISE,),
    **dict.fromkeys((
        "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    ), (DISCRETE,)),
    "HeunDiscreteScheduler": (
        replace(DISCRETE, defaults={**DISCRETE.defaults, "beta_start": 0.00085, "beta_end": 0.012}),
    ),
    "FlowMatchEulerDiscreteScheduler": (FLOW,),
    "Transformer3DModel": (
        replace(EASYANIMATE, defaults={"motion_module_type": "VanillaGrid", "enable_uvit": False}),
    ),
    "AutoencoderKLMagvit": (EASYANIMATE_VAE,),
    "T5EncoderModel": (T5,),
    # sections of the YAML files of EasyAnimate
    "transformer_additional_kwargs": (EASYANIMATE,),
    "noise_scheduler_kwargs": (DISCRETE,),
}  # fmt: skip


@register("layout", "diffusers")
class Diffusers:
    """Folders of a diffusers pipeline; names such as "transformer/proj_out.weight"."""

    @dataclass
    class Config(LayoutConfig):
        def published_classes(self) -> Mapping[str, tuple[ReleasedClass, ...]]:
            return RELEASED

        def recognises(self, names: frozenset[str]) -> bool:
            return any(name.startswith(("transformer/", f"transformer{EMA}/")) for name in names)

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, state: State) -> dict[str, State]:
        """States by component; raises ValueError for an unknown folder.

        Of transformer/ and transformer_ema/, which diffusers' training scripts write, EMA counts.
        """
        found: dict[str, State] = {}
        averaged = {n.partition("/")[0].removesuffix(EMA) for n in state if f"{EMA}/" in n}
        if averaged:
            log_once(f"EMA weights taken: {', '.join(f'{x}{EMA}/' for x in sorted(averaged))}")
        for name, tensor in state.items():
            folder, _, rest = name.partition("/")
            if folder in averaged:
                continue
            folder = folder.removesuffix(EMA)
            if folder not in FOLDERS:
                raise ValueError(f"{name}: want a name in one of {', '.join(FOLDERS)}")
            part, prefix = FOLDERS[folder]
            found.setdefault(part, {})[prefix + rest] = tensor
        return found

    def join(self, parts: dict[str, State]) -> State:
        """The inverse of `split`; raises ValueError for a component without a folder."""
        folders = {part: (folder, prefix) for folder, (part, prefix) in FOLDERS.items()}
        state: State = {}
        for part, tensors in parts.items():
            if part not in folders:
                raise ValueError(f"{part}: diffusers has no folder for it")
            folder, prefix = folders[part]
            state |= {f"{folder}/{k.removeprefix(prefix)}": v for k, v in tensors.items()}
        return state

    def described(
        self, configs: Mapping[str, PluginConfig], copied: Mapping[str, list[str] | None]
    ) -> dict[str, dict[str, Any]]:
        """The JSON files of a pipeline's folder, by path; model_index.json is the last.

        `configs`: Configs of a wired system by group; `copied`: copied text folders, with library
        and class if known. Raises ConfigError for everything without a class or setting in
        diffusers.
        """
        groups = ("backbone", "vae", "schedule", "sampler", "conditioning")
        found = {name: diffusers_config(name, configs[name]) for name in groups}
        if problems := [p for _, own in found.values() for p in own]:
            raise ConfigError(*problems)
        network, first_stage, noise, sampler, _ = (found[name][0] for name in groups)
        conditioning: Any = configs["conditioning"]
        has_image = bool(conditioning.images())
        if has_image:
            # the latents of an image are multiplied by scaling_factor, or divided by it
            scale, inverted = conditioning.image_latent_scale, first_stage["scaling_factor"] ** -2
            if not (isclose(scale, 1.0) or isclose(scale, inverted)):
                raise ConfigError(
                    f"conditioning.image_latent_scale={scale}: diffusers has 1.0, or {inverted} "
                    "(invert_scale_latents)"
                )
            first_stage["invert_scale_latents"] = not isclose(scale, 1.0)
        parts = {"scheduler": sampler | noise, "transformer": network, "vae": first_stage}
        classes = {name: ["diffusers", part["_class_name"]] for name, part in parts.items()}
        text = {k: (copied[k] or v) if k in copied else [None, None] for k, v in TEXT.items()}
        kind = PIPELINES[network["_class_name"]][has_image]
        version = {"_diffusers_version": VERSION}
        files = {f"{name}/{FILES[name]}": part | version for name, part in parts.items()}
        index = {"_class_name": kind, **version, **dict(sorted((classes | text).items()))}
        return files | {"model_index.json": index}


def diffusers_config(group: str, cfg: PluginConfig) -> tuple[dict[str, Any], list[str]]:
    """The Config's diffusers settings, or the problems that prevent an export."""
    try:
        settings = cfg.diffusers_config()
    except ConfigError as e:
        return {}, [f"{group}.{p}" for p in e.problems]
    name = cfg.plugin.rpartition("/")[2]
    problem = f"{group}={name}: has no class in diffusers; format=diffusers is for CogVideoX"
    return settings, [] if settings else [problem]
