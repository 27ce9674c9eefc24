"""Closes the loop: when explorers may explore, and how new weights reach them."""
