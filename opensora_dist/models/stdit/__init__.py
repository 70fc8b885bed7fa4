"""STDiT: attention factorised over space and time."""
