"""The command line: one file per verb, which parses, calls a recipe and prints."""
