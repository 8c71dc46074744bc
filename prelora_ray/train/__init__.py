"""Training a run: the loop that Ray Train's workers run through all phases, and the driver that starts them."""
