"""Launch environment, process group, worker processes, locks, heartbeats and signals."""
