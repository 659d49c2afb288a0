"""The search for launch parameters of the project's own kernels, with Optuna."""
