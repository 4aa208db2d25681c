"""Who lives and who holds which block, kept where a restarted controller and new processes find it."""
