"""Errors, logging, file helpers and registries: the ground floor, which imports nothing above it."""
