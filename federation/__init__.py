"""What both sides of a federation must agree on; it knows neither side."""
