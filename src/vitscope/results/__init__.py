"""Results: one value per patch or per segment, and how it came about."""
