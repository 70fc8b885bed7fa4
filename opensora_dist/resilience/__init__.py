"""What keeps a run's work when the machine doesn't: signals, and agreement of all ranks on what they mean."""
