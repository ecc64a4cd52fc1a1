"""Microbenchmarks, step benchmarks and checks that print the numbers of the documentation."""
