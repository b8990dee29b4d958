"""The benchmark of training steps, as it runs on every rank; ``mpitrain bench training`` is its command."""
