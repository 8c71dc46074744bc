"""Fast forms of what `method/` says plainly: torch and Triton, nothing of the project."""
