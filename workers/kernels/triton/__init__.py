"""Attention on an NVIDIA GPU, in Triton: split over the slots, partials merged, caches read where they lie.

Importing this package needs `triton`. With TRITON_INTERPRET=1 set before that, the same kernels run
slowly on the CPU: so they are tested on any machine.
"""
