"""What stages share: the training loop, opening, images in memory, augmentation, masks, pairs of features."""
