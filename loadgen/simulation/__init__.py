"""The project's own policies over modelled hardware, on a virtual clock."""
