"""One process that decides who lives where. The only place that knows Ray is `controller.fleet`."""
