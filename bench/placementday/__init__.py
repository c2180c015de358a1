"""A simulated day of expert load, and systems that place experts during it."""
