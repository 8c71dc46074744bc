"""What different settings of the test would have done: replay."""
