"""Development tools, left out of the published package: model zoo, demo, template source, set-up, test ranks."""
