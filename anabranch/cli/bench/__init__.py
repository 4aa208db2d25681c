"""`anabranch bench`: what the hot path costs on this machine, in turn with what it is compared to."""
