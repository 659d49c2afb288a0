"""Kernels of others behind the stages of this project: FlashMLA, SGLang's own, and a CPU stand-in."""
