"""The block engine: plan, forward and join of a block, journal, and the run that drives them."""
