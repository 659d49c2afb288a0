"""The Triton kernels and their launches; imported at the first launch, since importing Triton is slow."""
