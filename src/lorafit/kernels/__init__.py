"""Numbers, each with its reference beside it."""
