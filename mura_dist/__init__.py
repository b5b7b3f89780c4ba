"""mura_dist: from a folder of bone radiographs to a trained, honestly measured, deployable model."""

__version__ = "0.1.0"
