"""The terminal door: one file for each command."""
