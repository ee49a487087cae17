"""Image sources: whatever the user names becomes uint8 pictures and labels, in one fixed order, with bounded memory."""
