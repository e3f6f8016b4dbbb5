"""Networks, in full precision and in few bits."""
