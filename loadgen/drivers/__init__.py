"""How requests reach a server: one driver per API, all with the same face."""
