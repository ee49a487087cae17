"""One module per command with one run(...) each: plain values in, a manifest or metrics out, nothing printed."""
