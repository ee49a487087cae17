"""The only code that touches artifact files."""
