"""Studies of one question each, apart from the trainer."""
