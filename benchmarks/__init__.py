"""Measurements, each a module of its own: ``python -m benchmarks.NAME`` prints a table and writes its results."""
