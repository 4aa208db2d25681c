"""Many loads on many clusters: where each is saturated, what it costs there, and which settings are best."""
