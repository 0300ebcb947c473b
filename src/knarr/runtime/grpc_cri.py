"""The CRI gRPC client under the name that callers import; the work is in the package criapi."""

from knarr.runtime.criapi.client import GRPCRuntime

__all__ = ["GRPCRuntime"]
