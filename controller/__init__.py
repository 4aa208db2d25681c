"""One process that decides who lives where. Ray is known in `fleet` and `ray_connection` alone."""

import os

# Before anything imports grpc: its fork handlers run in the processes that Ray forks here, and can hang
# them. Nothing of ours forks and then speaks gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
