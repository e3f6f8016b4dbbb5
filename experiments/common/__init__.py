"""What all parts share: configurations, devices, files, progress."""
