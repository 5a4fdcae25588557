"""Results: one value per patch, pixel or segment, with the provenance."""
