"""One honest load, measured in a fresh process."""
