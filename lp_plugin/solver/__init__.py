"""Layers, devices and a workload -> costs of every possible stage -> the best boundaries, proven."""
