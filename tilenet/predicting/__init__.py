"""Named inputs to masks: what `tilenet.api` is made of."""
