"""Stages by themselves, without pipeline and checkpoint: their layers timed, their passes counted."""
