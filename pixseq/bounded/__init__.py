"""The one gate for bytes that others wrote: what they declare is held against what is there and a cap, before memory
is taken for it.
"""
