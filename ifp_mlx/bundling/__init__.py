"""Bundles for apps: a core, tasks on demand, and metadata."""
