"""From a grid of points to stored measurements: plan, isolated worker, runner."""
