"""Workflows, which turn a task into calls of the policy."""
