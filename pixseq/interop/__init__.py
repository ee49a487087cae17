"""Weights of other programs, read without those programs."""
