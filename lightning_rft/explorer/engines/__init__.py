"""Inference engines, each of which samples tokens from the policy's weights."""
