"""A worker's process, one per rank: load, cache, patch and sample models."""
