"""The event log: gives each envelope its `seq`, makes it durable, hands it on in order, reads it back.

`base.py` is the seam; `memory.py` and `sqlite.py` are the stores that ship.
"""
