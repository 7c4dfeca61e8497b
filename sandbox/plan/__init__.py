"""What a configuration is and costs, before it runs: full size, without memory for its weights."""
