"""What `opensora-dist bench` runs."""
