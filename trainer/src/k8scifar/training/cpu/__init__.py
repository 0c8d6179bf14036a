"""Code for CPUs only: faster convolutions, and memory settings."""
