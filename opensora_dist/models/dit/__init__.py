"""DiT for video: joint attention over all tokens of a clip."""
