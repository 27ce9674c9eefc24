"""Produces: processes that answer tasks with an inference engine and score the answers."""
