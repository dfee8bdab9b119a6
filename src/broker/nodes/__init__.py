"""Nodes: the processes that share a store. Who they are, what operators ask them, what operators switch on all of them."""

from broker.nodes.base import Nodes, NodeSelf
from broker.nodes.overview import Overview

__all__ = ["NodeSelf", "Nodes", "Overview"]
