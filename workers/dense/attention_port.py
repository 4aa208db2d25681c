"""What the model asks of attention; the model's only view of where the KV cache lies."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionPort(Protocol):
    """Attention of one micro-batch during one step; rows are the step's tokens in plan order.

    Per layer the calls come in this order, layers ascending:

        send_query -> send_key_value -> (the caller may run another micro-batch) -> receive

    An implementation knows the plan: which row belongs to which sequence and which positions it sees.
    It scales scores by head_size ** -0.5 and applies the layer's sliding window.
    """

    def send_query(self, layer: int, query: Tensor) -> None:
        """Take `query` [rows, query_heads, head_size], rotated, model dtype; it leaves at once.

        The tensor belongs to the port from here on.
        """
        ...

    def send_key_value(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Take `key` (rotated) and `value`, each [rows, kv_heads, head_size] in model dtype.

        Both may be views into one fused tensor: contiguous within a row, not across rows.
        """
        ...

    def receive(self, layer: int) -> Tensor:
        """Wait for and return the merged output [rows, query_heads, head_size] in model dtype.

        Raises `LaneBroken` or `DeadlineExceeded` of `cluster.errors` when it cannot be had.
        """
        ...
