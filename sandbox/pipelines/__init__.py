"""task=encode and task=prepare."""
