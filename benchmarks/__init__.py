"""Benchmarks and compile reports. Every command here runs without a GPU, if smaller."""
