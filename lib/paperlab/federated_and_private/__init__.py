"""Learning across clients that keep their data, join as they please, or ask to be forgotten."""
