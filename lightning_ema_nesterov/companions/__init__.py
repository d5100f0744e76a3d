"""Neighbouring published methods, one folder each; nothing else in the package imports them."""
