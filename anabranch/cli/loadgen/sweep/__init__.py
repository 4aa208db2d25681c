"""`anabranch loadgen sweep`: loads, clusters and settings, modelled or real."""
