"""Networks in few bits, and in whole numbers."""
