"""The public functions: check the inputs, choose a backend, call the op."""
