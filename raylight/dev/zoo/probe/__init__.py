"""Draft the plan of a new model: `python -m raylight.dev.zoo.probe`."""
