"""The Config side: what a plugin takes, needs and makes, answered in plain Python before a run."""
