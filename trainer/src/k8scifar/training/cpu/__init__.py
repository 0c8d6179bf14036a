"""What only a CPU runs: faster convolutions and memory settings."""
