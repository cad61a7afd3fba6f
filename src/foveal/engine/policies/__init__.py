"""The window policies, one file for each kind."""
