"""What hardware can do, and what a run will cost on it."""
