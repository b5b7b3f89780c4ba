"""Loading: shards to batches on the device."""
