"""Files: atomic writes, tar shards, files of weights, checkpoints."""
