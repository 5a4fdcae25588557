"""Objects cut out of a photo and pasted back smaller, elsewhere, mirrored, apart, or over another background."""
