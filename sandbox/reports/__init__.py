"""Pages, figures, tables and media of runs and ablations."""
