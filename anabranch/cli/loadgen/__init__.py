"""`anabranch loadgen`: what a cluster, or any OpenAI-compatible endpoint, gives under a chosen load."""
