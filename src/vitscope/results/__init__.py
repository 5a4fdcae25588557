"""Results: one value per patch or per segment, with its provenance."""
