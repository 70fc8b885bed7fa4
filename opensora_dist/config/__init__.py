"""What a run is: schemas with every default written once, loading with overrides, and rules across fields."""
