"""Device detection, timing and numerical comparison. Nothing here knows what is being timed."""
