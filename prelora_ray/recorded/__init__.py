"""What the folder of a run tells, read back: its records, its test replayed, what is to be said of it."""
