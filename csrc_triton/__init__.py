"""Triton twins of `scfg.reference`: same names, parameters, order and defaults, for CUDA tensors."""
