"""Several clusters under the same loads, measured in more than one way, and what the ways agree on."""
