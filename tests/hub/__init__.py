"""A Hub on loopback that the stock clients talk to over HTTP, with faults on request. For tests only."""

from hub.server import HubServer, serve

__all__ = ["HubServer", "serve"]
