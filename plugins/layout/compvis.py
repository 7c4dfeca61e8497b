"""Full-system checkpoints of CompVis latent-diffusion and DynamiCrafter.

One state dict: `model.diffusion_model.` the network, `model_ema.` its EMA under names without dots,
`first_stage_model.`, the encoders of conditioning, and the tables of the schedule at the top level.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sandbox.contracts import LayoutConfig, ReleasedClass, State, StorageError, one_of
from sandbox.registry import register

DIALECTS = ("plain", "deepspeed", "256")
NETWORK, WRAPPED, EMA = "model.diffusion_model.", "model.", "model_ema."
FIRST_STAGE = "first_stage_model."
CONDITIONING = ("cond_stage_model.", "embedder.", "image_proj_model.")
LAUNCHER_PREFIXES = ("_forward_module.", "module.")  # added by DeepSpeed and DDP
FPS, FPS_256 = "fps_embedding.", "framestride_embed."  # the latter in the 256 model
COUNTERS = ("decay", "num_updates")  # of the EMA
TABLES = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "scale_arr",
})  # fmt: skip
LOGVAR = "logvar"  # of a loss with learn_logvar
TOP = TABLES | {LOGVAR}
KNOWN = (NETWORK, EMA, FIRST_STAGE, *CONDITIONING)
MEASURED = ("scale", "shift")  # tensors of a first stage that measures them on the data
ALONE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "loss.")

# --- settings -------------------------------------------------------------------------------------

SCHEDULE = ReleasedClass(
    "schedule/ddpm",
    names={
        "linear_start": "betas.0",
        "linear_end": "betas.1",
        "parameterization": "prediction",
        "rescale_betas_zero_snr": "zero_terminal_snr",
    },
    values={"beta_schedule": {"linear": "scaled_linear", "sqrt_linear": "linear", "sqrt": "sqrt",
                              "cosine": "cosine"}},
    switches={"use_dynamic_rescale": ("base_scale", "turning_step")},
    fixed={"num_timesteps_cond": 1, "given_betas": None, "learn_sigma": False,
           "scale_by_std": False, "v_posterior": 0},
    defaults={"linear_start": 1e-4, "linear_end": 2e-2, "timesteps": 1000,
              "beta_schedule": "linear", "parameterization": "eps", "base_scale": 0.7,
              "turning_step": 400},
    ignored=(
        "first_stage_key", "cond_stage_key", "image_size", "channels", "monitor", "log_every_t",
        "use_ema", "ckpt_path", "ignore_keys", "load_only_unet", "clip_denoised",
        "first_stage_config", "cond_stage_config", "cond_stage_trainable", "conditioning_key",
        "concat_mode", "cond_stage_forward", "image_proj_model_trainable", "uncond_prob",
        "uncond_type",
        "rand_cond_frame", "fps_condition_type", "interp_mode", "perframe_ae", "noise_strength",
        "use_positional_encodings", "logdir", "empty_params_only",
        "use_scale", "en_and_decode_n_samples_a_time", "scheduler_config",
    ),
)  # fmt: skip
LOSS = ReleasedClass("loss/ldm")  # all names are equal
SCALE = ReleasedClass("vae/*", names={"scale_factor": "scale_factor"})
UNET_DEFAULTS = {  # of both constructors
    "channel_mult": [1, 2, 4, 8], "num_heads": -1, "num_head_channels": -1, "dropout": 0.0,
}  # fmt: skip
UNET_IGNORED = ("use_fp16", "lora_args", "use_bf16")
UNET_2D = ReleasedClass(
    "backbone/unet2d",
    fixed={"dims": 2, "num_classes": None, "n_embed": None},
    ignored=UNET_IGNORED,
    defaults={**UNET_DEFAULTS, "use_spatial_transformer": False},
)
UNET_3D = ReleasedClass(
    "backbone/unet3d",
    fixed={"dims": 2},
    ignored=(*UNET_IGNORED, "image_size"),
    defaults={**UNET_DEFAULTS, "image_cross_attention": False},
)
FIRST_STAGE_NAMES = {f"ddconfig.{k}": k for k in (
    "double_z", "z_channels", "resolution", "in_channels", "out_ch", "ch", "ch_mult",
    "num_res_blocks", "attn_resolutions", "dropout",
)}  # fmt: skip
FIRST_STAGE_ALONE = {
    "names": FIRST_STAGE_NAMES,
    "fixed": {"remap": None, "ddconfig.tanh_out": False, "ddconfig.attn_type": "vanilla",
              "ddconfig.resamp_with_conv": True, "ddconfig.give_pre_end": False,
              "ddconfig.use_linear_attn": False},
    "ignored": ("monitor", "ckpt_path", "lossconfig", "image_key", "ignore_keys", "use_ema",
                "colorize_nlabels", "sane_index_shape", "batch_resize_range", "lr_g_factor",
                "scheduler_config", "input_dim", "test", "logdir", "test_args"),
    "defaults": {"ddconfig.dropout": 0.0},
    "sets": {"num_groups": 32, "shift": 0.0, "scale_factor": 1.0},
}  # fmt: skip
KL = ReleasedClass("vae/kl", **FIRST_STAGE_ALONE)
VQ = ReleasedClass("vae/vq", **FIRST_STAGE_ALONE)
IMAGES = "conditioning/dynamicrafter"
OF_PIPELINE = ReleasedClass(IMAGES, ignored=("image_size",))  # uncond_prob, interp_mode, ...
RESAMPLER = ReleasedClass(
    IMAGES, fixed={"embedding_dim": 1280}, ignored=("output_dim",),  # the width of its tokens
)  # fmt: skip
TEXT_TOWER = ReleasedClass(
    IMAGES,
    fixed={"arch": "ViT-H-14", "max_length": 77, "layer": "penultimate"},
    ignored=("freeze", "version", "device"),
    sets={"text_width": 1024, "text_layers": 24, "text_heads": 16, "embed_dim": 1024},
)
IMAGE_TOWER = ReleasedClass(
    IMAGES,
    fixed={"arch": "ViT-H-14", "antialias": True},
    ignored=("freeze", "version", "device", "layer", "ucg_rate"),
    sets={"vision_width": 1280, "vision_layers": 32, "vision_head_width": 80, "patch_size": 14,
          "image_size": 224, "mlp_ratio": 4.0},
)  # fmt: skip
RELEASED = {
    "resampler.Resampler": (RESAMPLER,),
    "condition.FrozenOpenCLIPEmbedder": (TEXT_TOWER,),
    "condition.FrozenOpenCLIPImageEmbedderV2": (IMAGE_TOWER,),
    "ddpm.LatentDiffusion": (SCHEDULE, LOSS, SCALE),
    "ddpm3d.LatentDiffusion": (SCHEDULE, LOSS, SCALE),
    "ddpm3d.LatentVisualDiffusion": (SCHEDULE, LOSS, SCALE, OF_PIPELINE),
    "ddpm.DDPM": (SCHEDULE, LOSS),
    "openaimodel.UNetModel": (UNET_2D,),
    "openaimodel3d.UNetModel": (UNET_3D,),
    "autoencoder.AutoencoderKL": (KL,),
    "autoencoder.VQModel": (VQ,),
    "autoencoder.VQModelInterface": (VQ,),
    "vqgan.VQModel": (VQ,),
}


@register("layout", "compvis")
class CompVis:
    """Full-system checkpoints of CompVis latent-diffusion and DynamiCrafter, in all dialects."""

    @dataclass
    class Config(LayoutConfig):
        """dialect: the dialect to write; all are read.

        plain: {"state_dict": ...}; deepspeed: {"module": ...} with a prefix before each name; 256:
        plain, with the fps embedding's name in the 256 model of DynamiCrafter.
        """

        dialect: str = "plain"

        def problems(self) -> Iterator[str]:
            yield from super().problems()
            yield from one_of("dialect", self.dialect, DIALECTS)

        def published_classes(self) -> Mapping[str, tuple[ReleasedClass, ...]]:
            return RELEASED

        def recognises(self, names: frozenset[str]) -> bool:
            """A full system, or a first stage alone."""
            network = tuple(prefix + NETWORK for prefix in ("", *LAUNCHER_PREFIXES))
            is_alone = all(name.startswith(ALONE) for name in names)
            return bool(names) and (is_alone or any(name.startswith(network) for name in names))

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def split(self, state: State) -> dict[str, State]:
        """States by component, under our names; components that the file lacks are empty.

        ema has the names of the backbone, with `decay` and `num_updates`; schedule holds the
        tables, loss a learned logvar. For a file of a first stage alone, only vae is set, without
        the weights of its loss. Raises StorageError for names of another layout.
        """
        found: dict[str, State] = {name: {} for name in PARTS}
        state = {_plain_name(name): tensor for name, tensor in state.items()}
        if all(name.startswith(ALONE) for name in state):
            return found | {"vae": {k: v for k, v in state.items() if not k.startswith("loss.")}}
        dotted = {_flat(k): k.removeprefix(NETWORK) for k in state if k.startswith(NETWORK)}
        unknown = []
        for name, tensor in state.items():
            place = _place(name, dotted)
            if place is None:
                unknown.append(name)
            else:
                found[place[0]][place[1]] = tensor
        if unknown:
            raise StorageError(
                f"{len(unknown)} names are not those of layout=compvis: "
                f"{', '.join(sorted(unknown)[:10])}"
            )
        return found

    def join(self, parts: dict[str, State]) -> State:
        """The inverse of `split`, in the chosen dialect.

        Raises StorageError for names that the published checkpoints do not have.
        """
        if measured := [k for k in MEASURED if k in parts.get("vae", {})]:
            raise StorageError(
                f"vae.{' and '.join(measured)}: measured per channel, but the published "
                "configurations have one number: want vae.scale_factor=NUMBER vae.shift=0"
            )
        state = dict(parts.get("schedule", {}))
        state |= {NETWORK + k: v for k, v in parts.get("backbone", {}).items()}
        state |= {
            EMA + (k if k in COUNTERS else _flat(NETWORK + k)): v
            for k, v in parts.get("ema", {}).items()
        }
        state |= {FIRST_STAGE + k: v for k, v in parts.get("vae", {}).items()}
        state |= parts.get("conditioning", {}) | parts.get("loss", {})
        if unknown := [name for name in state if not name.startswith(KNOWN) and name not in TOP]:
            raise StorageError(
                f"layout=compvis cannot store {len(unknown)} names of these components: "
                f"{', '.join(sorted(unknown)[:10])}"
            )
        if self.cfg.dialect == "256":
            state = {_name_256(name): tensor for name, tensor in state.items()}
        if self.cfg.dialect == "deepspeed":
            state = {LAUNCHER_PREFIXES[0] + name: tensor for name, tensor in state.items()}
        return state

    def file(self, state: State, steps: int) -> dict[str, Any]:
        """The object that the original code unpickles, for a model trained for `steps`."""
        where = "module" if self.cfg.dialect == "deepspeed" else "state_dict"
        return {where: state, "global_step": steps}


PARTS = ("backbone", "ema", "vae", "conditioning", "schedule", "loss")


def _plain_name(name: str) -> str:
    """A name of any dialect in the plain dialect."""
    for prefix in LAUNCHER_PREFIXES:
        name = name.removeprefix(prefix)
    old, new = NETWORK + FPS_256, NETWORK + FPS
    if name.startswith(old):
        return new + name.removeprefix(old)
    flat = EMA + _flat(old)
    return EMA + _flat(new) + name.removeprefix(flat) if name.startswith(flat) else name


def _name_256(name: str) -> str:
    """A name of the plain dialect in the 256 dialect."""
    for new, old in (
        (NETWORK + FPS, NETWORK + FPS_256),
        (EMA + _flat(NETWORK + FPS), EMA + _flat(NETWORK + FPS_256)),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _flat(name: str) -> str:
    """The name of an EMA weight: the name inside `model`, without dots."""
    return name.removeprefix(WRAPPED).replace(".", "")


def _place(name: str, dotted: dict[str, str]) -> tuple[str, str] | None:
    """(component, name in it), or None for an unknown name. `dotted`: flat name -> dotted name."""
    if name.startswith(NETWORK):
        return "backbone", name.removeprefix(NETWORK)
    if name.startswith(EMA):
        own = name.removeprefix(EMA)
        own = own if own in COUNTERS else dotted.get(own)
        return ("ema", own) if own else None
    if name.startswith(FIRST_STAGE):
        return "vae", name.removeprefix(FIRST_STAGE)
    if name.startswith(CONDITIONING):
        return "conditioning", name
    if name in TABLES:
        return "schedule", name
    return ("loss", name) if name == LOGVAR else None
