"""The mesh, keyed randomness, rank spawning and the ZeRO backends. Names no model."""
