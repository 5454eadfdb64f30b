"""Associative memories and energy models."""
