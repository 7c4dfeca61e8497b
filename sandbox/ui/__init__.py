"""The page of task=ui."""
