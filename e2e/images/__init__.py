"""JPEG decoding and augmentation on the device."""
