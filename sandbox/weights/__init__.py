"""External weights: init_from, files of full systems, export."""
