"""Shards: WebDataset tars of preprocessed radiographs."""
