"""What to write in place of a preset that is now part of a recipe, or of settings.

Shown by the error for an unknown option and by docs/migration.md.
"""

OLD_PRESETS = {
    "adapter/lora_cogvideox": "adapter=lora adapter.rank=128 adapter.alpha=64.0",
    "adapter/lora_cogvideox_tiny": "adapter=lora adapter.alpha=4.0",
    "adapter/lora_easyanimate":
        "adapter=lora adapter.rank=128 adapter.alpha=64.0 adapter.layout=kohya",
    "adapter/lora_easyanimate_tiny":
        "adapter=lora adapter.rank=4 adapter.alpha=2.0 adapter.layout=kohya",
    "adapter/lora_r16": "adapter=lora adapter.rank=16 adapter.alpha=16.0",
    "backbone/cogvideox_1_5_5b_i2v_tiny": "experiment=cogvideox_1_5_5b_i2v_lora_tiny",
    "backbone/cogvideox_1_5_5b_tiny": "experiment=cogvideox_1_5_5b_sft_tiny",
    "backbone/cogvideox_2b_tiny": "experiment=cogvideox_2b_sft_tiny",
    "backbone/cogvideox_5b_i2v_tiny": "experiment=cogvideox_5b_i2v_lora_tiny",
    "backbone/cogvideox_5b_tiny": "experiment=cogvideox_5b_sft_tiny",
    "backbone/dit_factorised": "backbone=dit backbone.attention=factorised",
    "backbone/dit_motion":
        "backbone=dit backbone.attention=spatial backbone.motion_module=vanilla "
        "backbone.skips=uvit",
    "backbone/dit_patch4": "backbone=dit backbone.patch=4",
    "backbone/dit_w96": "backbone=dit backbone.width=96 backbone.num_heads=3",
    "backbone/easyanimate_tiny": "experiment=easyanimate_v2_lora_tiny",
    "backbone/easyanimate_v2_untold": "backbone=easyanimate_v2 backbone.caption_channels=0",
    "backbone/unet2d_ldm_celebahq": "experiment=ldm_celebahq_vq4",
    "backbone/unet2d_ldm_tiny": "experiment=ldm_celebahq_vq4_tiny",
    "backbone/unet3d_dynamicrafter_1024": "experiment=dynamicrafter_1024",
    "backbone/unet3d_dynamicrafter_256":
        "experiment=dynamicrafter_512 backbone.image_cross_attention_scale_learnable=true "
        "backbone.default_fs=3",
    "backbone/unet3d_dynamicrafter_512": "experiment=dynamicrafter_512",
    "backbone/unet3d_dynamicrafter_tiny": "experiment=dynamicrafter_512_tiny",
    "callbacks/images_dynamicrafter":
        "callbacks=[images] callbacks.images.unit=micro_batch "
        "callbacks.images.increase_log_steps=false",
    "callbacks/images_dynamicrafter_tiny": "experiment=dynamicrafter_512_tiny",
    "callbacks/images_easyanimate_vae":
        "callbacks=[images] callbacks.images.every=5000 "
        "callbacks.images.rows=[reconstruction]",
    "callbacks/images_ldm": "experiment=ldm_celebahq_vq4",
    "callbacks/images_ldm_tiny": "experiment=ldm_celebahq_vq4_tiny",
    "callbacks/samples_cogvideox_tiny":
        "callbacks=[samples] callbacks.samples.every=50 callbacks.samples.count=2",
    "callbacks/val_loss_first_stage": "callbacks=[val_loss] callbacks.val_loss.every=5000",
    "callbacks/val_loss_ldm_celebahq":
        "callbacks=[val_loss] callbacks.val_loss.every=521 callbacks.val_loss.clips=5000",
    "callbacks/val_loss_tiny":
        "callbacks=[val_loss] callbacks.val_loss.every=100 callbacks.val_loss.clips=64",
    "checkpoint/keep_all": "checkpoint=keep checkpoint.every=1000 checkpoint.milestones=1000",
    "checkpoint/keep_cogvideox": "checkpoint=keep checkpoint.every=500 checkpoint.keep=10",
    "checkpoint/keep_cogvideox_tiny": "checkpoint=keep checkpoint.every=50 checkpoint.keep=10",
    "checkpoint/keep_dynamicrafter":
        "checkpoint=keep checkpoint.every=9000 checkpoint.keep=1 "
        "checkpoint.weights_every=10000",
    "checkpoint/keep_dynamicrafter_tiny":
        "checkpoint=keep checkpoint.every=90 checkpoint.keep=1 checkpoint.weights_every=100",
    "checkpoint/keep_easyanimate":
        "checkpoint=keep checkpoint.every=500 checkpoint.keep=1 checkpoint.milestones=500",
    "checkpoint/keep_easyanimate_lora":
        "checkpoint=keep checkpoint.every=100 checkpoint.keep=1 checkpoint.milestones=100",
    "checkpoint/keep_easyanimate_vae":
        "checkpoint=keep checkpoint.every=1000 checkpoint.keep=1 checkpoint.milestones=1000",
    "checkpoint/keep_ldm_celebahq": "experiment=ldm_celebahq_vq4",
    "checkpoint/keep_ldm_tiny": "experiment=ldm_celebahq_vq4_tiny",
    "checkpoint/keep_vq_f4": "experiment=ldm_celebahq_vq4_first_stage",
    "checkpoint/keep_vq_tiny": "experiment=ldm_celebahq_vq4_first_stage_tiny",
    "conditioning/dynamicrafter_1024": "experiment=dynamicrafter_1024",
    "conditioning/dynamicrafter_512": "experiment=dynamicrafter_512",
    "conditioning/dynamicrafter_512_interp": "experiment=dynamicrafter_512_interp",
    "conditioning/dynamicrafter_tiny":
        "conditioning=dynamicrafter conditioning.fps_condition_type=fps",
    "conditioning/dynamicrafter_tiny_interp":
        "conditioning=dynamicrafter conditioning.rand_cond_frame=false "
        "conditioning.interp_mode=true conditioning.fps_condition_type=fps",
    "conditioning/t5_cogvideox_1_5_i2v":
        "conditioning=t5_cogvideox conditioning.image=first_frame "
        "conditioning.image_latent_scale=2.0408163265306123 conditioning.ofs=2.0",
    "conditioning/t5_cogvideox_1_5_i2v_tiny": "experiment=cogvideox_1_5_5b_i2v_lora_tiny",
    "conditioning/t5_cogvideox_i2v": "conditioning=t5_cogvideox conditioning.image=first_frame",
    "conditioning/t5_cogvideox_i2v_tiny": "experiment=cogvideox_5b_i2v_lora_tiny",
    "conditioning/t5_cogvideox_tiny": "experiment=cogvideox_2b_sft_tiny",
    "conditioning/t5_easyanimate_online":
        "conditioning=t5_easyanimate "
        "conditioning.weights=alibaba-pai/EasyAnimateV2-XL-2-512x512",
    "conditioning/t5_easyanimate_tiny": "experiment=easyanimate_v2_lora_tiny",
    "conditioning/t5_image":
        "conditioning=t5 conditioning.image=first_frame conditioning.drop_image=0.05",
    "conditioning/words_w96": "conditioning=words conditioning.width=96",
    "data/celebahq_256": "experiment=ldm_celebahq_vq4",
    "data/clips_easyanimate_magvit": "experiment=easyanimate_v2_vae_magvit",
    "data/clips_easyanimate_slice": "experiment=easyanimate_v2_vae_slice",
    "data/cogvideox_folder_tiny": "experiment=cogvideox_2b_sft_tiny",
    "data/easyanimate_json_512_images": "data=easyanimate_json_512 data.frames=1 data.only=image",
    "data/easyanimate_json_512_lora": "data=easyanimate_json_512 data.num_workers=4",
    "data/easyanimate_json_768":
        "data=easyanimate_json_512 data.height=768 data.width=768 data.image_size=768",
    "data/latents_49x480x720": "experiment=cogvideox_2b_sft",
    "data/latents_81x768x1360": "experiment=cogvideox_1_5_5b_sft",
    "data/latents_i2v_49x480x720": "experiment=cogvideox_5b_i2v_lora",
    "data/latents_i2v_81x768x1360": "experiment=cogvideox_1_5_5b_i2v_lora",
    "data/moving_digits_b16": "data=moving_digits data.batch_size=16",
    "data/moving_digits_backdrops": "experiment=effects/zero_terminal_snr",
    "data/moving_digits_easyanimate":
        "data=moving_digits data.batch_size=4 data.clips_per_epoch=400",
    "data/moving_digits_easyanimate_still":
        "data=moving_digits data.frames=1 data.batch_size=8 data.clips_per_epoch=400",
    "data/moving_digits_fast": "data=moving_digits data.frames=5 data.batch_size=16 data.speed=2",
    "data/moving_digits_rates_24":
        "data=moving_digits_rates data.height=24 data.width=24 data.batch_size=2",
    "data/moving_digits_speeds": "experiment=digits_speeds",
    "data/pictures_vq_f4": "experiment=ldm_celebahq_vq4_first_stage",
    "data/webvid_dynamicrafter_1024": "experiment=dynamicrafter_1024",
    "data/webvid_dynamicrafter_512": "experiment=dynamicrafter_512",
    "ema/warmup_easyanimate_vae": "ema=warmup ema.decay=0.9999 ema.warmup=false",
    "ema/warmup_ldm": "ema=warmup ema.decay=0.9999 ema.every=micro_batch",
    "guidance/cfg_cogvideox": "guidance=cfg guidance.guidance_scale=6.0",
    "guidance/cfg_dynamicrafter":
        "guidance=cfg guidance.guidance_scale=7.5 guidance.guidance_rescale=0.7",
    "guidance/cfg_easyanimate": "guidance=cfg guidance.guidance_scale=6.0",
    "guidance/dynamic_cogvideox": "guidance=cogvideox_dynamic",
    "logger/wandb_offline": "logger=wandb logger.mode=offline",
    "loss/hybrid_easyanimate": "loss=hybrid",
    "loss/hybrid_easyanimate_snr": "loss=hybrid loss.x0_below=250",
    "loss/ldm_dynamicrafter": "loss=ldm",
    "loss/ldm_simple": "loss=ldm",
    "lr_schedule/constant_at_once": "lr_schedule=constant",
    "lr_schedule/constant_warmup": "lr_schedule=constant lr_schedule.warmup=500",
    "lr_schedule/constant_warmup_cogvideox": "lr_schedule=constant lr_schedule.warmup=100",
    "lr_schedule/constant_warmup_easyanimate": "lr_schedule=constant lr_schedule.warmup=100",
    "lr_schedule/lambda_linear_ldm": "lr_schedule=lambda_linear lr_schedule.warm_up_steps=[10000]",
    "optimizer/adam_first_stage":
        "optimizer=adamw optimizer.betas=[0.5,0.9] optimizer.weight_decay=0.0",
    "optimizer/adamw_cogvideox": "optimizer=adamw optimizer.weight_decay=1.0e-4",
    "optimizer/adamw_dynamicrafter": "optimizer=adamw optimizer.betas=[0.9,0.999]",
    "optimizer/adamw_easyanimate":
        "optimizer=adamw optimizer.betas=[0.9,0.999] optimizer.weight_decay=0.03 "
        "optimizer.eps=1.0e-10",
    "optimizer/adamw_ldm": "optimizer=adamw optimizer.betas=[0.9,0.999]",
    "reconstruction/lpips_gan_easyanimate_magvit": "experiment=easyanimate_v2_vae_magvit",
    "reconstruction/lpips_gan_easyanimate_magvit_tiny": "experiment=easyanimate_v2_vae_magvit_tiny",
    "reconstruction/lpips_gan_easyanimate_slice": "experiment=easyanimate_v2_vae_slice",
    "reconstruction/lpips_gan_easyanimate_slice_decoder":
        "experiment=easyanimate_v2_vae_slice_decoder",
    "reconstruction/lpips_gan_easyanimate_slice_decoder_tiny":
        "experiment=easyanimate_v2_vae_slice_decoder_tiny",
    "reconstruction/lpips_gan_easyanimate_slice_tiny":
        "reconstruction=lpips_gan reconstruction.lpips=random reconstruction.disc_start=50 "
        "reconstruction.disc3d_channels=[32]",
    "reconstruction/lpips_gan_vq_f4": "experiment=ldm_celebahq_vq4_first_stage",
    "reconstruction/lpips_gan_vq_tiny":
        "reconstruction=lpips_gan reconstruction.lpips=random reconstruction.disc_weight=0.75",
    "sampler/ddim_cogvideox": "sampler=ddim sampler.steps=50 sampler.landing=stride",
    "sampler/ddim_cogvideox_tiny": "sampler=ddim sampler.steps=10 sampler.landing=stride",
    "sampler/ddim_dynamicrafter": "sampler=ddim sampler.steps=50 sampler.eta=1.0 sampler.end=first",
    "sampler/ddim_dynamicrafter_tiny":
        "sampler=ddim sampler.steps=10 sampler.eta=1.0 sampler.end=first",
    "sampler/ddim_ldm": "sampler=ddim sampler.steps=200 sampler.spacing=uniform sampler.end=first",
    "sampler/ddim_ldm_tiny": "sampler=ddim sampler.spacing=uniform sampler.end=first",
    "sampler/dpm_cogvideox": "sampler=cogvideox_dpm",
    "sampler/dpm_cogvideox_tiny": "sampler=cogvideox_dpm sampler.steps=10",
    "sampler/dpmpp_2m_easyanimate": "sampler=dpmpp_2m sampler.steps=50 sampler.spacing=linspace",
    "sampler/dpmpp_2m_easyanimate_tiny":
        "sampler=dpmpp_2m sampler.steps=8 sampler.spacing=linspace",
    "schedule/ddpm_cogvideox_2b":
        "schedule=ddpm schedule.snr_shift=3.0 schedule.zero_terminal_snr=true "
        "schedule.prediction=v",
    "schedule/ddpm_cogvideox_5b":
        "schedule=ddpm schedule.zero_terminal_snr=true schedule.prediction=v",
    "schedule/ddpm_cosine": "schedule=ddpm schedule.beta_schedule=cosine",
    "schedule/ddpm_dynamicrafter_1024":
        "schedule=ddpm schedule.zero_terminal_snr=true schedule.prediction=v "
        "schedule.base_scale=0.3",
    "schedule/ddpm_dynamicrafter_512":
        "schedule=ddpm schedule.zero_terminal_snr=true schedule.prediction=v "
        "schedule.base_scale=0.7",
    "schedule/ddpm_easyanimate":
        "schedule=ddpm schedule.beta_schedule=linear schedule.betas=[1.0e-4,0.02] "
        "schedule.learned_variance=true",
    "schedule/ddpm_ldm_celebahq": "schedule=ddpm schedule.betas=[0.0015,0.0195]",
    "schedule/ddpm_stable_diffusion_v":
        "schedule=ddpm_stable_diffusion schedule.prediction=v schedule.t_draw=stratified",
    "schedule/flow_uniform": "schedule=flow schedule.t_distribution=uniform",
    "stage/motion_easyanimate_article":
        "stage=[motion] stage.motion.method=raft stage.motion.weights=raft_large.pth",
    "stage/text_area_easyanimate_article":
        "stage=[text_area] stage.text_area.read=false stage.text_area.max=0.01",
    "task/sample_dynamicrafter_1024": "task=sample task.fps=10.0",
    "task/sample_dynamicrafter_512": "task=sample task.fps=24.0",
    "task/sample_dynamicrafter_512_interp": "task=sample task.fps=5.0",
    "task/sample_easyanimate_v2": "task=sample task.save_fps=24.0",
    "task/train_cogvideox": "task=train task.score_clips=1 task.samples=1 task.untrained=false",
    "task/train_cogvideox_tiny":
        "task=train task.score_clips=8 task.samples=2 task.untrained=false",
    "task/train_dynamicrafter": "experiment=dynamicrafter_512",
    "task/train_dynamicrafter_tiny": "experiment=dynamicrafter_512_tiny",
    "task/train_easyanimate": "task=train task.score_clips=1 task.samples=1 task.untrained=false",
    "task/train_easyanimate_tiny": "experiment=easyanimate_v2_lora_tiny",
    "task/train_effect_192": "task=train_effect task.score_clips=192",
    "task/train_pictures": "task=train task.score_clips=48 task.untrained=false",
    "task/train_vae_easyanimate_magvit": "task=train_vae task.batch_size=2 task.shown=8",
    "task/train_vae_easyanimate_slice": "task=train_vae task.batch_size=1 task.shown=8",
    "task/train_vae_easyanimate_tiny":
        "task=train_vae task.batch_size=4 task.clips=16 task.shown=4",
    "task/train_vae_vq_f4": "task=train_vae task.batch_size=8",
    "task/train_vae_vq_tiny": "task=train_vae task.batch_size=16 task.clips=64",
    "trainer/ddp_dynamicrafter": "experiment=dynamicrafter_512",
    "trainer/ddp_easyanimate_magvit": "experiment=easyanimate_v2_vae_magvit",
    "trainer/ddp_easyanimate_slice": "experiment=easyanimate_v2_vae_slice",
    "trainer/single_cogvideox": "trainer=single",
    "trainer/single_dynamicrafter_tiny":
        "trainer=single trainer.accumulate=2 trainer.clip=0.5 trainer.log_every=10",
    "trainer/single_easyanimate": "trainer=single",
    "trainer/single_easyanimate_lora": "trainer=single trainer.low_vram=true",
    "trainer/single_easyanimate_tiny": "trainer=single trainer.log_every=10",
    "trainer/single_ldm": "trainer=single trainer.clip=null",
    "trainer/single_thread": "trainer=single trainer.threads=1",
    "vae/cogvideox_2b_tiled":
        "vae=cogvideox_2b vae.one_by_one=true vae.use_slicing=true vae.use_tiling=true",
    "vae/cogvideox_2b_tiny": "experiment=cogvideox_2b_sft_tiny",
    "vae/cogvideox_5b_tiled":
        "vae=cogvideox_5b vae.one_by_one=true vae.use_slicing=true vae.use_tiling=true",
    "vae/cogvideox_5b_tiny": "experiment=cogvideox_5b_sft_tiny",
    "vae/kl_dynamicrafter_tiny": "vae=kl vae.ch=8 vae.num_groups=2",
    "vae/kl_f8_dynamicrafter": "experiment=dynamicrafter_512",
    "vae/magvit_easyanimate_tiny": "experiment=easyanimate_v2_lora_tiny",
    "vae/magvit_easyanimate_v2_released":
        "vae=magvit_easyanimate_v2 vae.weights=checkpoints/EasyAnimateV2-XL-2-512x512/vae",
    "vae/pca_given": "vae=pca vae.weights='${init_from}'",
    "vae/slice_easyanimate_tiny": "experiment=easyanimate_v2_vae_slice_tiny",
    "vae/slice_easyanimate_v3": "experiment=easyanimate_v2_vae_slice",
    "vae/vq_f2_tiny": "experiment=ldm_celebahq_vq4_tiny",
    "vae/vq_f4_celebahq": "vae=vq_f4 vae.weights=models/first_stage_models/vq-f4/model.ckpt",
}
