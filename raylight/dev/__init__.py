"""For developers, in no installation: the model zoo, the demo, the templates' source, the set-up, ranks for tests."""
