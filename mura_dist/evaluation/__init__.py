"""Evaluate runs, ensembles and ONNX files; score tables of predictions; write the gallery."""
