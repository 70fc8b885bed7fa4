"""The training loop and what it is made of: step, schedule, moving average, saving, validation, logging."""
