"""Whole networks and their files: one decoder, families as data."""
