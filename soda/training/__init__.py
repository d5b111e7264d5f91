"""Training SODA adapters: parameters, and a loop that knows no host."""
