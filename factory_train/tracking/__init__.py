"""MLflow tracking, fed from run directories by a process of its own; training never waits for it."""
