"""Explorers and trainer on a fake clock, under the schedule that real runs have."""
