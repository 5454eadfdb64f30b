"""Embeddings, metric learning and retrieval: one module a paper."""
