"""What this package promises, tried on a user's own machine and storage; see `__main__`."""
