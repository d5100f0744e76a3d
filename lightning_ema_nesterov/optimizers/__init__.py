"""Base optimizers, and how a configuration names them."""
