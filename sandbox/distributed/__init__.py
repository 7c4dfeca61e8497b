"""Processes of a run: ranks, their supervisor, remote errors, worker pools."""
