"""What a batch means: what is drawn for it, its loss, and how a model is evaluated."""
