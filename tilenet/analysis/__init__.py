"""What can be said of a finished mask."""
