"""How accurate networks get with the PSF of a slice of the mini-batch."""
