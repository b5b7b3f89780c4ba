"""Errors, settings, atomic files and storage."""
