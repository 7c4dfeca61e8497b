"""Scores of generated clips, and prompts to sample from."""
