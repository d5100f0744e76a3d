"""Studies: methods, base optimizers, learning rates and seeds, compared."""
