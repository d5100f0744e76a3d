"""Lookahead methods: what each keeps for a parameter, and how a step updates it."""
