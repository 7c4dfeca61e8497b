"""Weights of other origins: init_from, files of whole systems, export."""
