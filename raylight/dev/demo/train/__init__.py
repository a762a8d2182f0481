"""Trains the model that the demo draws with."""
