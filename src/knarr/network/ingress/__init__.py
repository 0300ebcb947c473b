"""Ingress: a controller that drives HAProxy through its runtime socket."""

from knarr.network.ingress.controller import IngressController

__all__ = ["IngressController"]
