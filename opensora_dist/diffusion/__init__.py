"""Objectives and samplers: pure functions of tensors, which know neither models nor ranks."""
