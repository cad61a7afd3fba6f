"""From text to weights: data, loss, optimiser, checkpoints, the training loop."""
