"""Two traces of torch.profiler compared: what ran on the GPU, how long, and where the difference lies."""
