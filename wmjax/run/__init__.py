"""What keeps a run alive and tells of it: checkpoints, signals, watchdog, metrics, processes."""
