"""Weight snapshots: what one version consists of, how it is published, kept and verified."""
