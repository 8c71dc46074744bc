"""Fast forms of what `method/` says plainly: torch alone, nothing of the project."""
