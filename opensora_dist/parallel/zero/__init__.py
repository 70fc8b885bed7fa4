"""ZeRO backends behind one protocol: who holds parameters, gradients and optimizer state."""
