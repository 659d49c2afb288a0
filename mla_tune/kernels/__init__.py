"""Inputs, references, kernels and the candidates built from them. Everything here knows MLA; nothing here measures."""
