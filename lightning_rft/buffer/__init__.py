"""The ledger of every group between exploring and training."""
