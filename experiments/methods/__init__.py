"""Methods: from a name and settings to an optimizer."""
