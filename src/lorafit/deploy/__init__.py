"""An adapter -> text. Reads what `model` loads; knows nothing of training."""
