"""Reports that people read: one HTML file each, with all that it needs inside (used by both sides)."""
