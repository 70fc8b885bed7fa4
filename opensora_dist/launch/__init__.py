"""How a run is handed to a scheduler, and how its restarts are decided on."""
