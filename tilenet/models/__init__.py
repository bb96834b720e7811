"""Networks: the card that describes one, where it lies, how it is built and what runs it."""
