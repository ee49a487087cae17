"""Every picture that is drawn: arrays and numbers in, uint8 [H, W, 3] or a PNG page out."""
