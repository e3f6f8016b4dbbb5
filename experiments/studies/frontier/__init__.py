"""Every cheap way to sharpness-aware training, on tasks of several kinds."""
