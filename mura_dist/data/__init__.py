"""Data: MURA's vocabulary, reading a radiograph, scanning a source, shards, batches."""
