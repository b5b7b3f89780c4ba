"""Scanning a folder in MURA's layout: files, CSVs, labels, duplicates, the report."""
