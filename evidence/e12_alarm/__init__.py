"""E12: cosine up, accuracy down, and the alarm for it."""
