"""How flat the minima are that runs ended in."""
