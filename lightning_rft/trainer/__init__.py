"""The part that turns experience into gradient steps."""
