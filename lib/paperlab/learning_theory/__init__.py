"""What networks can learn: dynamics, kernels, inductive biases and the geometry of solutions."""
