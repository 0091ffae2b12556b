"""The version, in one place: packaging, plan files and the CHANGELOG test read it."""

__version__ = "0.5.0"
