"""Weights split over the ranks with FSDP2: what is split, how a rank reads its rows, what streams from the CPU."""
