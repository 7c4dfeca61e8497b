"""The latent diffusion system and its components."""
