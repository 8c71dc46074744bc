"""What lets a run go on after anything: checkpoints, who holds a run, how it stops and why it failed."""
