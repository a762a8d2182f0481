"""Families with their plans taken away: what a model that nobody has seen gets on its first day."""
