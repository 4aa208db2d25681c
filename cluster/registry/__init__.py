"""Who lives, kept where a restarted controller and new processes find it."""
