"""What the terminal shows: tables of results, a bar for what takes a while, and a run that goes on."""
