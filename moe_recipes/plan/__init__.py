"""Arithmetic on a model config: parameters, bytes, time. No torch."""
