"""Operators with more than one implementation; callers name what they want, not who computes it."""
