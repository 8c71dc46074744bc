"""Other settings of the method: the map of a record, forks of a trunk, sweeps on Ray Tune, and their cost."""
