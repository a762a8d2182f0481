"""Finding out what a plan of a new model has to say: see `raylight.dev.zoo.probe.__main__`."""
