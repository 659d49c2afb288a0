"""From measurements to a policy: curves, crossovers, held-out evaluation. Pure arithmetic, no torch."""
