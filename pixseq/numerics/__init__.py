"""The formulas: arrays in, arrays out. No files, flags, printing or ranks."""
