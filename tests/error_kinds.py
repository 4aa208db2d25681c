"""Every error of the tree in cluster/errors.py, and no other."""

from cluster import errors

EVERY_KIND: list[type[errors.AnabranchError]] = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.AnabranchError)
    and kind is not errors.AnabranchError
]
