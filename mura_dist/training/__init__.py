"""Train a run: engine, loop, validation, checkpoints, schedule and the run's folder."""
