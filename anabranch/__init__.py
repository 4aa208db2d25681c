"""What applications import: the clients of an Anabranch cluster.

Events, answers and options are in `anabranch.events`, `anabranch.answers` and `anabranch.requests`;
errors in `cluster.errors`.
"""

from anabranch.async_client import AsyncClient
from anabranch.client import Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "__version__"]
