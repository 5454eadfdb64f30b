"""Output layers and losses: what turns a network's last vector into a prediction, and what it is trained on."""
