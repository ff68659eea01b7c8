"""How long things take on a device: profiles, this machine measured, and a model."""
