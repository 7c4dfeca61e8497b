"""task=plan: shapes, operations and memory of a configuration, without allocating it."""
