"""The report of runs or of a sweep: their records plotted, as one HTML page."""
