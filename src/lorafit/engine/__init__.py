"""Examples -> a better adapter: layout, step, evaluation, optimiser, precision. No files."""
