"""Attention on CPUs in C++ (attend.h), for caches in the packed layout (cache.h)."""
