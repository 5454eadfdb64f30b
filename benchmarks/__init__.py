"""Races against peers, run by hand (`make bench`): ratios within one run, never seconds across machines."""
