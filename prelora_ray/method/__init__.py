"""The PreLoRA method (arXiv 2509.21619) in plain torch: no Ray, no files, no clock."""
