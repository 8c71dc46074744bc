"""From image files to the batches that a worker trains on."""
