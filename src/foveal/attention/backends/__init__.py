"""One file for each way to compute attention; none imports another."""
