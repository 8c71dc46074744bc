"""What the folder of a run tells, read back: where it stands, what is to be said of it, and its test replayed."""
