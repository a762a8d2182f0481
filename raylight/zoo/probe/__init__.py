"""Finding out what a plan of a new model has to say: see `raylight.plans.probe`."""
