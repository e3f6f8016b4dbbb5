"""Where public implementations of sharpness-aware methods differ from their papers."""
