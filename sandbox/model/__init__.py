"""The latent diffusion system and what it is made of."""
