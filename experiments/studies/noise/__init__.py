"""What the published controller makes of norms that are nothing but noise."""
