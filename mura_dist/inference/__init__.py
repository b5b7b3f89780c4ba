"""Inference with exported models: load one, predict a directory, serve the page. No torch outside `export`."""
