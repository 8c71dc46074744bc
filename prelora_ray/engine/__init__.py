"""One process's training: model, phases, optimizer, steps. It knows no Ray, and no file of a run."""
