"""Triton kernels, installed as `factorkit.kernels`; `factorkit.ops` says what each of them means."""
