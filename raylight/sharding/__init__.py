"""Weights split over the ranks: what is split, how a rank reads its rows, what streams from the CPU."""
