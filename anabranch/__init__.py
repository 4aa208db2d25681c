"""What applications import: the clients of an Anabranch cluster.

Events, answers and options are in `anabranch.events`, `anabranch.answers` and `anabranch.requests`;
errors in `cluster.errors`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.async_client import AsyncClient
    from anabranch.client import Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    """The clients, imported when first asked for: whoever needs only the stubs need not wait for them."""
    if name == "AsyncClient":
        from anabranch.async_client import AsyncClient

        return AsyncClient
    if name == "Client":
        from anabranch.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
