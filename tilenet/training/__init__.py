"""From labelled images to a model folder: data, sampling, losses, the loop, the report."""
