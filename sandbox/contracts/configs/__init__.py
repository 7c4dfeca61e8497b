"""Base Configs: what a plugin requires and produces, in plain Python, known before a run."""
