"""Replays a trace of prompts through simulated workers, to see what routing knows is worth."""
