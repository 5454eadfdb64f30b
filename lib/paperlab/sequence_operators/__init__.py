"""Attention, state spaces and other sequence operators: one module a paper."""
