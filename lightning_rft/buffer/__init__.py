"""Holds: the ledger of every group between exploring and training."""
