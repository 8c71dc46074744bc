"""`prelora bench`: what the parts of a run cost, beside what others take for the same work."""
