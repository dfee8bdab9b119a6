"""Conversation broker: one order, filtered views, no gaps.

Start reading at `broker.broker`; plugin authors at `broker.hookspecs`.
"""

__version__ = "0.1.0"
