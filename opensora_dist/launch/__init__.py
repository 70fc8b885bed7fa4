"""How a run is handed to a scheduler. Whether it is started again, ``resilience.attempts`` decides."""
