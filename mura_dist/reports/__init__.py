"""HTML and SVG reports: evaluation, data set, contact sheet."""
