"""Images: JPEG decoding and augmentation of patches on their device."""
