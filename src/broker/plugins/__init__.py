"""Plugins: found, checked, called, contained; and what they are asked in general."""

from broker.plugins.host import PluginHost
from broker.plugins.isolation import IsolationLimits

__all__ = ["IsolationLimits", "PluginHost"]
