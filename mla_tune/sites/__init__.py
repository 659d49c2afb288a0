"""What is chosen: sites, models, candidates' stages, engines, providers, and the shapes that decide."""
