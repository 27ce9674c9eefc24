"""The explorer process: one engine, and the workflows and rewards that run beside it."""
