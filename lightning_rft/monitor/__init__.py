"""Observation of a run: metrics, the status line, and the timeline."""
