"""Objectives: advantages, losses, and how they are put together."""
