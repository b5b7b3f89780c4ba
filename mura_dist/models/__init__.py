"""Define the networks, the ensemble, the model card and the model list."""
