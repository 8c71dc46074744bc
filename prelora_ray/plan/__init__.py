"""What a run will cost, before a GPU is rented: the recipe's own steps at the speed of benchmarks. No Ray."""
