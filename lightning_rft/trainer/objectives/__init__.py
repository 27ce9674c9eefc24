"""Objectives: advantages, losses, and their combinations."""
