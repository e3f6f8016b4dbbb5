"""Memory and traffic per device for 10⁹ parameters."""
