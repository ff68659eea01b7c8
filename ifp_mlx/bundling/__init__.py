"""Bundles that an app can take: a core, tasks on demand, and what is known of them."""
