"""Every error of the tree in cluster/errors.py, and no other."""

from cluster import errors
from cluster.errors import AnabranchError

EVERY_KIND: list[type[AnabranchError]] = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, AnabranchError) and kind is not AnabranchError
]
