"""Paperlab: small, correct torch implementations of the methods of 220 deep-learning papers.

One module a paper, one folder a part of the book. What two papers need lives in `paperlab.nn`, `paperlab.data`,
`paperlab.training` and `paperlab.stats`. The package knows nothing of the book and can be used without it.
"""
