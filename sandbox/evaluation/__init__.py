"""Scores of generated clips, and prompts to generate from."""
