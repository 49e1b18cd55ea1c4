"""A base and an adapter -> something the engine can run."""
