"""Training of the demo's model."""
