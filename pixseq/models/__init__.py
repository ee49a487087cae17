"""Torch modules and what is computed from them. Single-device code that knows no files, flags or ranks."""
