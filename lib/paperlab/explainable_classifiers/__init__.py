"""Classifiers whose decisions can be read, followed and argued with."""
