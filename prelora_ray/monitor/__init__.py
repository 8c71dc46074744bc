"""What a run shows while it goes on: metrics for Prometheus, and TensorBoard logs."""
