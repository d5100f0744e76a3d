"""Compare methods on a model and data of the user's, at tuned learning rates and over seeds."""
