"""How a cluster is deployed where `anabranch up` does not reach."""
