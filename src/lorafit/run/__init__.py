"""Around the engine: callbacks, checkpoints, signals, journal, console."""
