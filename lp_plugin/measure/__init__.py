"""Measuring on the real device: what is there, and how long layers take. Needs torch."""
